"""`export`: a compressed folder as a stock dense checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import AsJson, Debug, Folder, Overwrite, Quiet, app
from .output import calm, megabytes, print_json, run


@app.command()
def export(
    folder: Folder,
    out: Annotated[
        Path | None, typer.Argument(help="the folder to write; omit it with --into-folder", show_default=False)
    ] = None,
    format: Annotated[  # noqa: A002
        str, typer.Option(help="checkpoint: a stock dense one; or onnx: codes, with operators that decode them")
    ] = ("checkpoint"),
    dtype: Annotated[
        str | None,
        typer.Option(help="checkpoint: dtype of the weights; the compressed model's if not given", show_default=False),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="onnx: int8 (if not given), float32 or both", show_default=False)
    ] = None,
    opset: Annotated[int | None, typer.Option(help="onnx: opset; 18 if not given", show_default=False)] = None,
    into_folder: Annotated[
        bool,
        typer.Option("--into-folder", help="onnx: write into onnx/ of FOLDER, with a stock config, instead of OUT"),
    ] = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write FOLDER for other tools: as a stock dense checkpoint, or as ONNX files that are as small as it is."""

    def work() -> None:
        from ..artifact.reading import EXPORT_FILE
        from ..export.exporting import check_export, export_folder

        options: dict[str, Any] = {
            "format": format,
            "dtype": dtype,
            "weights": weights,
            "opset": opset,
            "into_folder": into_folder,
            "overwrite": overwrite,
        }
        check_export(folder, out, **options)  # before torch is imported
        calm(quiet)
        written = export_folder(folder, out, **options)
        files = [file for ending in ("safetensors", "onnx") for file in sorted(written.rglob(f"*.{ending}"))]
        size = sum(file.stat().st_size for file in files)
        if as_json:
            import json

            print_json({**json.loads((written / EXPORT_FILE).read_text("utf-8")), "weight_bytes": size})
        elif format == "onnx" and not quiet:
            for file in files:
                print(f"{file}: {megabytes(file.stat().st_size)}, decoded by ONNX Runtime when a session is made.")
        elif not quiet:
            print(
                f"{written}: {megabytes(size)} of weights, a stock dense checkpoint with the decoded weights of {folder}."
            )

    run(work, debug, quiet)
