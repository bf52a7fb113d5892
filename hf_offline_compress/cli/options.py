"""Arguments and options that several commands take, and the application they belong to."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated

import typer

from ..request.reading import preset_names
from ..request.recipe import Recipe, Rule
from ..runtime.architectures_compressed import ARCHITECTURES

HELP = {
    item.name: str(item.metadata["help"]) for cls in (Rule, Recipe) for item in fields(cls) if "help" in item.metadata
}

app = typer.Typer(
    help="Make transformer models several times smaller, offline; AutoModel loads the result. Architectures: "
    f"{', '.join(entry.title for entry in ARCHITECTURES.values())}.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Base = Annotated[
    str, typer.Argument(metavar="BASE", help="the model to compress: a Hub id or a local folder", show_default=False)
]
RecipeOption = Annotated[
    str,
    typer.Option(
        help=f"a preset ({', '.join(preset_names())}) or a YAML file; `presets` says what they are",
        autocompletion=preset_names,
    ),
]
Ratio = Annotated[float | None, typer.Option(help=HELP["ratio"], show_default=False)]
Modules = Annotated[str | None, typer.Option(help=HELP["modules"] + "; with commas between", show_default=False)]
GroupingOption = Annotated[str | None, typer.Option(help=HELP["grouping"], show_default=False)]
Storage = Annotated[str | None, typer.Option(help=HELP["storage"], show_default=False)]
Allocation = Annotated[str | None, typer.Option(help=HELP["allocation"], show_default=False)]
TotalRatio = Annotated[
    float | None,
    typer.Option(
        help="4 bytes x all parameters, over the bytes of all weight files: a budget for all", show_default=False
    ),
]
MaxBytes = Annotated[
    str | None, typer.Option(help="the same budget in bytes, e.g. 6MB (of 1,000,000 bytes)", show_default=False)
]
Dtype = Annotated[
    str | None, typer.Option(help="dtype of the model; the checkpoint's if not given", show_default=False)
]
AutoClass = Annotated[
    str | None,
    typer.Option(help="class to load the base with; the one it was saved from if not given", show_default=False),
]
Folder = Annotated[
    Path, typer.Argument(metavar="FOLDER", help="a folder that compress has written", show_default=False)
]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="the folder to write", show_default=False)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace a folder that this command has written")]
Device = Annotated[str | None, typer.Option(help="where to compute, e.g. cuda", show_default=False)]
Revision = Annotated[str | None, typer.Option(help="branch, tag or commit of a base on the Hub", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON instead of tables")]
Debug = Annotated[bool, typer.Option("--debug", help="show the traceback of an error")]
Quiet = Annotated[bool, typer.Option("--quiet", help="print nothing but errors")]
