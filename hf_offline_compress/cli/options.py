"""Arguments and options that several commands take, and the application they belong to."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from ..request.reading import preset_names
from ..runtime.architectures_compressed import ARCHITECTURES

# Stands for the options of a command until they are read; see `takes`.
NOTHING_ELSE: Any = None

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
        help=f"a preset ({', '.join(preset_names())}) or a YAML file; see `presets`",
        autocompletion=preset_names,
    ),
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


def takes(
    kind: type[Any], names: Collection[str] | None = None, *, behind: str | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that gives a command the fields of an options dataclass in place of its argument `options`.

    Args:
        kind: the dataclass; of its fields, those that the command line knows.
        names: of fields, if not all of them.
        behind: field that the command's arguments left of `options` stand behind in the help, rather than before all fields.
    """
    known = [item for item in fields(kind) if item.metadata["cli"] and (names is None or item.name in names)]
    spelled = [item.metadata.get("name", item.name) for item in known]
    first = spelled.index(behind) + 1 if behind else 0

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        place = list(signature.parameters).index("options")
        # All by keyword: only so may arguments without a default stand behind those with one.
        only = inspect.Parameter.KEYWORD_ONLY
        own = [parameter.replace(kind=only) for name, parameter in signature.parameters.items() if name != "options"]
        shown = [
            inspect.Parameter(name, only, default=item.default, annotation=_typed(item, name))
            for name, item in zip(spelled, known, strict=True)
        ]
        order = [*shown[:first], *own[:place], *shown[first:], *own[place:]]

        @functools.wraps(command)
        def called(**given: Any) -> None:
            asked = {item.name: given.pop(name) for name, item in zip(spelled, known, strict=True)}
            command(**given, options=kind(**asked))

        called.__signature__ = signature.replace(parameters=order)  # type: ignore[attr-defined]
        called.__annotations__ = {parameter.name: parameter.annotation for parameter in order}
        return called

    return decorate


def _typed(item: Any, name: str) -> Any:
    """Return the annotation that Typer makes an option of."""
    said = item.metadata
    kind = said["cli"]
    names = [f"--{name.replace('_', '-')}"] if kind is bool else []
    limits = {"min": said["min"]} if "min" in said else {}
    shown = typer.Option(*names, help=said.get("help", said["text"]), show_default=item.default is not None, **limits)
    return Annotated[kind if item.default is not None else kind | None, shown]
