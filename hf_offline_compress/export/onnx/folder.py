"""A folder for ONNX Runtime and transformers.js: the model's files in `onnx/`, a stock config, tokenizer and companions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ...architectures.families import objective_of
from ...artifact.reading import ADVICE, EXPORT_FILE, ONNX_FOLDER, REPORT_FILE, compressed_config, is_part
from ...artifact.record import fingerprint, weight_files
from ...base.checkpoint import copy_companions
from ...errors import CompressionError, listing, needs_extra
from ...foundation import files
from ...foundation.files import read_json, whole_folder
from ...foundation.progress import stage
from ...foundation.tensor_files import check_weights
from ...runtime.architectures_compressed import CLASS_PREFIX, architecture_of
from ..dense import check_target, compressed_model, is_export, keep_own, stock_model

# What products are made with → the file that loaders look for.
FILES = {"int8": "onnx/model_quantized.onnx", "float32": "onnx/model.onnx"}
WEIGHTS = (*FILES, "both")
OPSETS = range(18, 24)
DEFAULT_OPSET = 18
PACKAGES = ("onnx", "onnxruntime", "onnxscript")


def export_onnx(
    folder: str | Path,
    out: str | Path | None,
    *,
    weights: str = "int8",
    opset: int = DEFAULT_OPSET,
    overwrite: bool = False,
) -> Path:
    """Write a compressed model as ONNX files that hold its codes, whole or not at all, and return the folder's path.

    The files are about as small as the folder's weights: ONNX Runtime decodes them once, when a session is made. Inputs
    are `input_ids`, `attention_mask` and, where the tokenizer makes them, `token_type_ids`, [batch, tokens], int64;
    outputs are named as the stock model's. A causal language model takes `input_ids` and `position_ids` of the new tokens,
    `attention_mask` of all, and `past_key_values.N.key` and `.value` of the tokens before, [batch, heads, tokens, width],
    float32, of no tokens at first; it gives `logits` of the new tokens, and `present.N.key` and `.value` of all.

    Args:
        folder: a compressed model.
        out: where to; it must not exist yet, or be empty. None for `onnx/` in the compressed folder, where a stock config
            is put beside the files; `card` then says how they are run.
        weights: how products are made: "int8", with inputs that are rounded as they come; "float32"; or "both", a file each.
        opset: of ONNX.
        overwrite: replace a folder that an export has written.

    Raises:
        CompressionError: see `check_onnx_export`. Nothing has been written.
    """
    source = Path(folder)
    target = source / ONNX_FOLDER if out is None else Path(out)
    config = check_onnx_export(source, out, weights=weights, opset=opset, overwrite=overwrite)
    from .model import onnx_models, save

    kinds = tuple(FILES) if weights == "both" else (weights,)
    with stage("loading and decoding"):
        compressed = compressed_model(source)
        stock = stock_model(compressed)
    with stage("making the graph"):
        cached = generates(config)
        token_types = not cached and _has_token_types(source)
        models = onnx_models(compressed, stock, kinds, opset=opset, token_types=token_types, cached=cached)
    keep = keep_own if out is not None else _keep_beside
    with whole_folder(target, is_export if overwrite else None, keep) as partial:
        with stage(f"saving {target.name}"):
            for kind, model in models.items():
                save(model, partial / (Path(FILES[kind]).name if out is None else FILES[kind]))
        stock.config.save_pretrained(partial)
        if out is not None:
            copy_companions(source, partial)
            _put_chat_template(partial)
            if (source / REPORT_FILE).is_file():
                shutil.copyfile(source / REPORT_FILE, partial / REPORT_FILE)
        content = _record(source, config, type(stock).__name__, kinds, opset)
        if out is None:
            content |= {"weights": weight_files(source), "files": _written(partial)}
        (partial / EXPORT_FILE).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
    return target


def check_onnx_export(
    folder: str | Path,
    out: str | Path | None,
    *,
    weights: str = "int8",
    opset: int = DEFAULT_OPSET,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Return the compressed folder's config if `export_onnx` could write it, without torch; see there.

    Raises:
        CompressionError: the folder is no compressed model, or of a head that cannot be exported; an option is unknown; a
            package is missing; `out` cannot be written.
    """
    config = compressed_config(Path(folder))
    check_weights(Path(folder), ADVICE)
    if weights not in WEIGHTS:
        raise CompressionError(f"The weights '{weights}' are not known; known are {listing(WEIGHTS)}.")
    if opset not in OPSETS:
        raise CompressionError(f"The opset {opset} is not supported; supported are {OPSETS[0]} to {OPSETS[-1]}.")
    check_head(config)
    check_packages()
    if out is None:
        if (Path(folder) / ONNX_FOLDER).is_symlink():  # what is written there would not be in the folder
            raise CompressionError(f"'{ONNX_FOLDER}' in '{folder}' is a link; remove it, or pass an output folder.")
        files.check_target(Path(folder) / ONNX_FOLDER, overwrite, is_export, "an export", ())
    else:
        check_target(Path(folder), Path(out), overwrite)
    return config


def generates(config: Mapping[str, Any]) -> bool:
    """Return whether a compressed model's file has a cache: whether it is a causal architecture's language model."""
    entry = architecture_of(str(config["model_type"]))
    return bool(entry and entry.causal) and objective_of(str(config["architectures"][0])) == "causal"


def check_head(config: Mapping[str, Any]) -> None:
    """Raise CompressionError unless a compressed model's head can be exported."""
    name = str(config["architectures"][0]).removeprefix(CLASS_PREFIX)
    entry = architecture_of(str(config["model_type"]))
    if config.get("add_cross_attention"):
        reason = "attends to another model's outputs, which ONNX files here do not take"
    elif entry and entry.causal and not generates(config):
        reason = "is a causal model without its language head, of which no ONNX file can be made"
    elif entry and not entry.causal and (config.get("is_decoder") or objective_of(name) == "causal"):
        reason = "is an encoder that was made a decoder, of which no ONNX file can be made"
    else:
        return
    raise CompressionError(f"{name} {reason}; export it with --format checkpoint.")


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


def _put_chat_template(folder: Path) -> None:
    """Put a chat template that is a file of its own into tokenizer_config.json too: transformers.js looks there alone."""
    template, file = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    config = read_json(file)
    if config is not None and template.is_file():
        config.setdefault("chat_template", template.read_text("utf-8"))
        file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _keep_beside(old: Path, new: Path) -> None:
    """Keep the user's own files beside those of an export into a compressed folder that is replaced."""
    files.keep_others(old, new, lambda name: is_part(f"{ONNX_FOLDER}/{name}"))


def _written(folder: Path) -> dict[str, dict[str, Any]]:
    """Return name → bytes and sha256 of the files of a folder."""
    return {file.name: fingerprint(file) for file in sorted(folder.iterdir())}


def _record(
    source: Path, config: dict[str, Any], architecture: str, kinds: tuple[str, ...], opset: int
) -> dict[str, Any]:
    """Return the record of an export."""
    from ...version import __version__

    return {
        "exported_from": source.resolve().name,
        "compressed_class": config["architectures"][0],
        "architecture": architecture,
        "onnx": {kind: FILES[kind] for kind in kinds},
        "opset": opset,
        "hf-offline-compress": __version__,
    }
