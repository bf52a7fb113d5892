"""`compress`: make a model smaller and write the folder."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from ..foundation.preflight import shard_bytes
from ..foundation.progress import stage
from ..request.reading import load_recipe
from ..request.recipe import DEFAULT_RECIPE
from ..request.selectors import split_selectors
from .options import (
    Allocation,
    AsJson,
    AutoClass,
    Base,
    Debug,
    Device,
    Dtype,
    GroupingOption,
    MaxBytes,
    Modules,
    Out,
    Overwrite,
    Quiet,
    Ratio,
    RecipeOption,
    Revision,
    Storage,
    TotalRatio,
    app,
)
from .output import calm, print_json, run
from .summary import print_summary


@app.command()
def compress(
    base: Base,
    out: Out,
    recipe: RecipeOption = DEFAULT_RECIPE,
    ratio: Ratio = None,
    modules: Modules = None,
    grouping: GroupingOption = None,
    storage: Storage = None,
    allocation: Allocation = None,
    total_ratio: TotalRatio = None,
    max_bytes: MaxBytes = None,
    max_loss: Annotated[
        float | None,
        typer.Option(
            help="find the smallest size whose loss on held-out text is at most this, e.g. 0.01 for 1 %",
            show_default=False,
        ),
    ] = None,
    calibration: Annotated[
        str, typer.Option(help="text to calibrate on: bundled, none, a file with one text a line, or a data set's name")
    ] = "bundled",
    validation: Annotated[
        str | None,
        typer.Option(
            help="held-out text: what is trained keeps the step of lowest perplexity on it; a file or a data set's name",
            show_default=False,
        ),
    ] = None,
    auto_class: AutoClass = None,
    dtype: Dtype = None,
    device: Device = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="calibration texts in one forward pass", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="of everything random")] = 0,
    revision: Revision = None,
    max_shard_size: Annotated[str, typer.Option(help="split larger weights into files of this size")] = "50GB",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="run code that comes with the base's tokenizer")
    ] = False,
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
        check_target(out, overwrite, [base])
        shard_bytes(max_shard_size)
        load_recipe(recipe)  # before torch is imported: a typing error is answered at once
        calm(quiet)
        with stage("importing torch and transformers"):  # which takes seconds
            from ..compressor import compress as do

        result = do(
            base,
            recipe,
            ratio=ratio,
            modules=split_selectors(modules),
            grouping=grouping,
            storage=storage,
            allocation=allocation,
            total_ratio=total_ratio,
            max_bytes=max_bytes,
            max_loss=max_loss,
            calibration=calibration,
            validation=validation,
            auto_class=auto_class,
            dtype=dtype,
            device=device,
            batch_size=batch_size,
            seed=seed,
            revision=revision,
            trust_remote_code=trust_remote_code,
            progress=not quiet,
            target=out,
        )
        result.save(out, overwrite=overwrite, max_shard_size=max_shard_size)
        saved = inspect_folder(out)
        if as_json:
            print_json(saved.report or result.report.to_dict())
        elif not quiet:
            seconds = time.monotonic() - started
            print_summary(out, base, result.report, saved.weight_bytes, saved.folder_bytes, seconds)

    run(work, debug, quiet)
