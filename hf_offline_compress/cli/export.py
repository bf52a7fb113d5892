"""`export`: a compressed folder as a stock dense checkpoint."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import AsJson, Debug, Folder, Out, Overwrite, Quiet, app
from .output import calm, megabytes, print_json, run


@app.command()
def export(
    folder: Folder,
    out: Out,
    dtype: Annotated[
        str | None, typer.Option(help="dtype of the weights; the compressed model's if not given", show_default=False)
    ] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write FOLDER as a stock dense checkpoint, for tools that know only those (ONNX export, serving)."""

    def work() -> None:
        from ..export.dense import EXPORT_FILE, check_export, export_folder

        check_export(folder, out, dtype=dtype, overwrite=overwrite)  # before torch is imported
        calm(quiet)
        export_folder(folder, out, dtype=dtype, overwrite=overwrite)
        size = sum(file.stat().st_size for file in out.rglob("*.safetensors"))
        if as_json:
            import json

            print_json({**json.loads((out / EXPORT_FILE).read_text("utf-8")), "weight_bytes": size})
        elif not quiet:
            print(
                f"{out}: {megabytes(size)} of weights, a stock dense checkpoint with the decoded weights of {folder}."
            )

    run(work, debug, quiet)
