"""`card`: write the model card of a compressed folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import AsJson, Debug, Folder, Quiet, app
from .output import print_json, run


@app.command()
def card(
    folder: Folder,
    license_: Annotated[
        str | None,
        typer.Option(
            "--license", help="licence of the model, by its Hub name; the base's if not given", show_default=False
        ),
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="the base's Hub id, if it was compressed from a local folder", show_default=False)
    ] = None,
    language: Annotated[
        str | None,
        typer.Option(
            help="languages of the model, comma-separated, e.g. en; the base's if not given", show_default=False
        ),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(help="local folder of the base, to read licence and languages from its card", show_default=False),
    ] = None,
    model_id: Annotated[
        str | None,
        typer.Option(help="model id that the card's code loads; the folder's name if not given", show_default=False),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace a README.md that this command did not write")
    ] = False,
    stdout: Annotated[bool, typer.Option("--stdout", help="print the card instead of writing it")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write the model card of FOLDER from its report and evaluations; your notes in it are kept."""

    def work() -> None:
        from ..card import parse_card, write_card
        from ..card.writing import CARD_FILE, card_text

        languages = [part.strip() for part in language.split(",")] if language else None
        options: dict[str, Any] = {
            "license": license_,
            "base_model": base_model,
            "language": languages,
            "base": base,
            "model_id": model_id,
            "overwrite": overwrite,
        }
        text = card_text(folder, **options) if stdout else write_card(folder, **options).read_text("utf-8")
        if as_json:
            print_json(
                {
                    "file": CARD_FILE,
                    "written": not stdout,
                    "metadata": parse_card(text).data.to_dict(),
                    **({"text": text} if stdout else {}),
                }
            )
        elif stdout:
            print(text, end="")
        elif not quiet:
            print(f"{folder / CARD_FILE}: written")

    run(work, debug, quiet)
