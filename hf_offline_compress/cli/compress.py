"""`compress`: make a model smaller and write the folder."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ..foundation.preflight import check_decoding, shard_bytes
from ..foundation.processes import is_main_process
from ..foundation.progress import stage
from ..foundation.unfinished import leftover_of
from ..request.options import CompressionOptions
from ..request.reading import load_recipe
from ..request.recipe import DEFAULT_RECIPE
from ..request.selectors import split_selectors
from .options import NOTHING_ELSE, AsJson, Base, Debug, Out, Overwrite, Quiet, RecipeOption, app, takes
from .output import calm, print_json, run
from .summary import print_summary


@app.command()
@takes(CompressionOptions)
def compress(
    base: Base,
    out: Out,
    recipe: RecipeOption = DEFAULT_RECIPE,
    options: CompressionOptions = NOTHING_ELSE,
    max_shard_size: Annotated[str, typer.Option(help="split the weights into files of at most this size")] = "50GB",
    decoding: Annotated[
        str | None,
        typer.Option(
            help="how the folder's weights are held when it is loaded: cached, on_the_fly, int8, auto",
            show_default="cached",
        ),
    ] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compress BASE and write a folder that AutoModel loads."""

    def work() -> None:
        from ..artifact.reading import inspect_folder
        from ..artifact.writing import check_target

        started = time.monotonic()
        check_target(out, overwrite, [base], resume=options.resume)
        shard_bytes(max_shard_size)
        check_decoding(decoding)
        load_recipe(recipe)  # before torch is imported: a typing error is answered at once
        calm(quiet or not is_main_process())
        with stage("importing torch and transformers"):  # which takes seconds
            from ..compressor import compress as do

        asked = replace(
            options, modules=split_selectors(options.modules), progress=not quiet and is_main_process(), target=out
        )
        result = do(base, recipe, asked)
        result.save(out, overwrite=overwrite, max_shard_size=max_shard_size, decoding=decoding)
        if not is_main_process():
            return
        saved = inspect_folder(out)
        if as_json:
            print_json(saved.report or result.report.to_dict())
        elif not quiet:
            seconds = time.monotonic() - started
            print_summary(out, base, result.report, saved.weight_bytes, saved.folder_bytes, seconds)

    run(_saying_what_is_kept(work, out) if options.resume else work, debug, quiet or not is_main_process())


def _saying_what_is_kept(work: Callable[[], None], out: Path) -> Callable[[], None]:
    """Return the work, with what lies in OUT.partial named where it is told to end."""

    def telling() -> None:
        try:
            work()
        except KeyboardInterrupt as error:
            left = leftover_of(out)
            raise type(error)(f"the same command goes on from '{left.name}'" if left else "") from error

    return telling
