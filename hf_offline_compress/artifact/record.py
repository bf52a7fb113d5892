"""`verification.json`: what a folder was when it was saved, so that any later process can tell whether it still is."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..foundation.schemas import mismatch
from .probe import probe_inputs, probe_outputs
from .schemas import RECORD
from .sizes import folder_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RECORD_FILE = "verification.json"
FORMAT_VERSION = 1
# Of the outputs' root mean square: rounding in other kernels, on other processors, in other versions.
TOLERANCES = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}


def write_record(folder: Path, model: PreTrainedModel) -> None:
    """Record the model's outputs on fixed inputs and the weight files that are in a folder.

    Args:
        folder: where the model has just been saved; `verification.json` is written into it.
        model: as it is in memory, so that a later comparison tests saving and loading.
    """
    head = type(model).__name__
    inputs = probe_inputs(model.config, head)
    content = {
        "format_version": FORMAT_VERSION,
        "class": head,
        "dtype": str(model.dtype).removeprefix("torch."),
        "compressed_modules": len(model.compressed_modules()),  # type: ignore[operator]
        "weights": weight_files(folder),
        "inputs": inputs,
        "outputs": probe_outputs(model, inputs),
        "versions": {name: version(name) for name in ("hf-offline-compress", "transformers", "torch")},
    }
    (folder / RECORD_FILE).write_text(json.dumps(content) + "\n", "utf-8")


def read_record(folder: Path) -> dict[str, Any] | None:
    """Return a folder's record, or None if it has none.

    Raises:
        ValueError: there is one that this version cannot read.
    """
    file = folder / RECORD_FILE
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text("utf-8"))
        content["format_version"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"it is damaged ({type(error).__name__})") from error
    if content["format_version"] != FORMAT_VERSION:
        raise ValueError(f"it has format version {content['format_version']}, this code reads {FORMAT_VERSION}")
    if problem := mismatch(content, RECORD):
        raise ValueError(f"it is damaged, {problem}")
    return dict(content)


def weight_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Return name → bytes and sha256 of every safetensors file of a folder."""
    return {name: fingerprint(folder / name) for name in folder_files(folder) if name.endswith(".safetensors")}


def fingerprint(file: Path) -> dict[str, Any]:
    """Return bytes and sha256 of a file."""
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": digest}
