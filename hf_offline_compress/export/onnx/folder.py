"""A folder for ONNX Runtime and transformers.js: the model's files in `onnx/`, a stock config, tokenizer and companions."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ...artifact.reading import ADVICE, REPORT_FILE, compressed_config
from ...base.checkpoint import copy_companions
from ...errors import CompressionError, listing, needs_extra
from ...foundation.files import whole_folder
from ...foundation.progress import stage
from ...foundation.tensor_files import check_weights
from ...runtime.architectures_compressed import CLASS_PREFIX, architecture_of
from ..dense import EXPORT_FILE, check_target, compressed_model, is_export, keep_own, stock_model

# What products are made with → the file that loaders look for.
FILES = {"int8": "onnx/model_quantized.onnx", "float32": "onnx/model.onnx"}
WEIGHTS = (*FILES, "both")
OPSETS = range(18, 24)
DEFAULT_OPSET = 18
PACKAGES = ("onnx", "onnxruntime", "onnxscript")


def export_onnx(
    folder: str | Path, out: str | Path, *, weights: str = "int8", opset: int = DEFAULT_OPSET, overwrite: bool = False
) -> Path:
    """Write a compressed model as ONNX files that hold its codes, whole or not at all, and return the folder's path.

    The files are about as small as the folder's weights: ONNX Runtime decodes them once, when a session is made. Inputs
    are `input_ids`, `attention_mask` and, where the tokenizer makes them, `token_type_ids`, [batch, tokens], int64;
    outputs are named as the stock model's.

    Args:
        folder: a compressed model.
        out: where to; it must not exist yet, or be empty.
        weights: how products are made: "int8", with inputs that are rounded as they come; "float32"; or "both", a file each.
        opset: of ONNX.
        overwrite: replace a folder that an export has written.

    Raises:
        CompressionError: see `check_onnx_export`. Nothing has been written.
    """
    source, target = Path(folder), Path(out)
    config = check_onnx_export(source, target, weights=weights, opset=opset, overwrite=overwrite)
    from .model import onnx_models, save

    kinds = tuple(FILES) if weights == "both" else (weights,)
    with stage("loading and decoding"):
        compressed = compressed_model(source)
        stock = stock_model(compressed)
    with stage("making the graph"):
        models = onnx_models(compressed, stock, kinds, opset=opset, token_types=_has_token_types(source))
    with whole_folder(target, is_export if overwrite else None, keep_own) as partial:
        with stage(f"saving {target.name}"):
            for kind, model in models.items():
                save(model, partial / FILES[kind])
        stock.config.save_pretrained(partial)
        copy_companions(source, partial)
        if (source / REPORT_FILE).is_file():
            shutil.copyfile(source / REPORT_FILE, partial / REPORT_FILE)
        (partial / EXPORT_FILE).write_text(_record(source, config, type(stock).__name__, kinds, opset), "utf-8")
    return target


def check_onnx_export(
    folder: str | Path,
    out: str | Path,
    *,
    weights: str = "int8",
    opset: int = DEFAULT_OPSET,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Return the compressed folder's config if `export_onnx` could write it, without torch; see there.

    Raises:
        CompressionError: the folder is no compressed model, or a causal one; an option is unknown; a package is missing;
            `out` cannot be written.
    """
    config = compressed_config(Path(folder))
    check_weights(Path(folder), ADVICE)
    if weights not in WEIGHTS:
        raise CompressionError(f"The weights '{weights}' are not known; known are {listing(WEIGHTS)}.")
    if opset not in OPSETS:
        raise CompressionError(f"The opset {opset} is not supported; supported are {OPSETS[0]} to {OPSETS[-1]}.")
    name = str(config["architectures"][0]).removeprefix(CLASS_PREFIX)
    entry = architecture_of(str(config["model_type"]))
    if (entry and entry.causal) or config.get("is_decoder"):
        raise CompressionError(
            f"{name} generates from what came before, which ONNX files of encoders cannot; export it with --format checkpoint."
        )
    check_packages()
    check_target(Path(folder), Path(out), overwrite)
    return config


def check_packages() -> None:
    """Raise CompressionError unless all is there that makes ONNX files."""
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise CompressionError(needs_extra("An ONNX file", listing(missing), "onnx"))
    found = version("transformers")  # not imported: with it comes torch
    if tuple(map(int, found.split(".")[:2])) < (5, 23):
        raise CompressionError(f"ONNX files need transformers 5.23 or newer; {found} is installed.")


def _has_token_types(folder: Path) -> bool:
    """Return whether the folder's tokenizer tells segments apart."""
    from transformers import AutoTokenizer

    if not (folder / "tokenizer_config.json").is_file():
        return False
    names: list[str] = AutoTokenizer.from_pretrained(folder).model_input_names
    return "token_type_ids" in names


def _record(source: Path, config: dict[str, Any], architecture: str, kinds: tuple[str, ...], opset: int) -> str:
    """Return what an export says of itself."""
    from ...version import __version__

    content = {
        "exported_from": source.resolve().name,
        "compressed_class": config["architectures"][0],
        "architecture": architecture,
        "onnx": {kind: FILES[kind] for kind in kinds},
        "opset": opset,
        "hf-offline-compress": __version__,
    }
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
