"""Export of a compressed folder to a format that other tools load, by the format's name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import CompressionError, listing

FORMATS = ("checkpoint", "onnx")


def export_folder(
    folder: str | Path,
    out: str | Path | None = None,
    *,
    format: str = "checkpoint",  # noqa: A002  (as the option is called)
    dtype: str | None = None,
    weights: str | None = None,
    opset: int | None = None,
    into_folder: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write a compressed model atomically for tools without this package, and return the path.

    Tokenizer, licence and other companions are carried along, code is not.

    Args:
        folder: a compressed model, written by `compress`, or by `save_pretrained` after fine-tuning.
        out: output folder, new or empty. None with `into_folder`.
        format: "checkpoint", a stock dense checkpoint, as large as the base; or "onnx", files that are about as small as
            the compressed weights and that ONNX Runtime decodes when a session is made.
        dtype: of a checkpoint's weights, "float32", "float16" or "bfloat16"; by default the compressed model's.
        weights: of ONNX files, "int8" (the default), "float32" or "both".
        opset: of ONNX files; by default 18.
        into_folder: put ONNX files and a stock config into `onnx/` of the compressed folder, so that one repository serves
            AutoModel and ONNX Runtime.
        overwrite: replace a folder that an export has written.

    Raises:
        CompressionError: `folder` is no compressed model, `out` cannot be written, a package is missing, or an option is
            unknown or not of this format. Nothing has been written.
    """
    options = _options(format, dtype, weights, opset)
    place = _place(out, format, into_folder)
    if format == "onnx":
        from .onnx.folder import export_onnx

        return export_onnx(folder, place, overwrite=overwrite, **options)
    from . import dense

    assert place is not None
    return dense.export_folder(folder, place, overwrite=overwrite, **options)


def check_export(
    folder: str | Path,
    out: str | Path | None = None,
    *,
    format: str = "checkpoint",  # noqa: A002
    dtype: str | None = None,
    weights: str | None = None,
    opset: int | None = None,
    into_folder: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Return the compressed folder's config if `export_folder` could write it, without torch; see there.

    Raises:
        CompressionError: it could not.
    """
    options = _options(format, dtype, weights, opset)
    place = _place(out, format, into_folder)
    if format == "onnx":
        from .onnx.folder import check_onnx_export

        return check_onnx_export(folder, place, overwrite=overwrite, **options)
    from . import dense

    assert place is not None
    return dense.check_export(folder, place, overwrite=overwrite, **options)


def _place(out: str | Path | None, name: str, into_folder: bool) -> str | Path | None:
    """Return where to; None for the compressed folder itself.

    Raises:
        CompressionError: there is no place, or there are two, or the form does not go into a compressed folder.
    """
    if into_folder and name != "onnx":
        raise CompressionError(
            f"The format '{name}' does not go into the compressed folder; pass an output folder, or --format onnx."
        )
    if into_folder == (out is not None):
        problem = "both were" if into_folder else "neither was"
        raise CompressionError(
            f"An export needs an output folder or, for ONNX files, --into-folder (into_folder=True); {problem} given."
        )
    return out


def _options(name: str, dtype: str | None, weights: str | None, opset: int | None) -> dict[str, Any]:
    """Return the options that were given.

    Raises:
        CompressionError: the format is unknown, or one of them is not its own.
    """
    if name not in FORMATS:
        raise CompressionError(f"The format '{name}' is unknown; known: {listing(FORMATS)}.")
    own: dict[str, Any] = {"dtype": dtype}
    other: dict[str, Any] = {"weights": weights, "opset": opset}
    if name == "onnx":
        own, other = other, own
    if foreign := [option for option, value in other.items() if value is not None]:
        raise CompressionError(f"The format '{name}' has no {listing(foreign)}; leave it out.")
    return {option: value for option, value in own.items() if value is not None}
