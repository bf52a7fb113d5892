"""Export to a stock dense checkpoint: decoded weights, stock class and config, for tools that load only those."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..architectures.families import FAMILIES
from ..architectures.layout import ParameterLayout
from ..architectures.stock import layout_of_config
from ..artifact.reading import ADVICE, EXPORT_FILE, REPORT_FILE, compressed_config
from ..base.checkpoint import COMPANIONS, check_fit, copy_companions, drop_absent, quiet_transformers
from ..errors import CompressionError, listing, refusing
from ..foundation import files
from ..foundation.files import keep_others, whole_folder
from ..foundation.progress import stage
from ..foundation.tensor_files import check_weights
from ..request.recipe import STORAGES
from ..runtime.architectures_compressed import CLASS_PREFIX, TYPE_PREFIX

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

# What an export writes beside companions, and so is replaced with it.
WRITTEN = re.compile(
    rf"config\.json|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|{EXPORT_FILE}|{REPORT_FILE}|"
    r"\d+_[\w-]+/[^/]+\.(json|txt|safetensors)|onnx/model(_quantized)?\.onnx|generation_config\.json"
)
# Fields of a compressed model's config that a stock one does not have, or has of its own.
NOT_CARRIED = (
    "model_type",
    "transformers_version",
    "architectures",
    "_name_or_path",
    "auto_map",
    "compression",
    "dtype",
    "torch_dtype",
)


def export_folder(folder: str | Path, out: str | Path, *, dtype: str | None = None, overwrite: bool = False) -> Path:
    """Write a compressed model as a stock dense checkpoint, whole or not at all, and return its path.

    The weights are those that the compressed model decodes; it is as large as the base. Tokenizer, licence and other
    companions are carried along, code is not.

    Args:
        folder: a compressed model, written by `compress`, or by `save_pretrained` after fine-tuning.
        out: where to; it must not exist yet, or be empty.
        dtype: of the weights, "float32", "float16" or "bfloat16"; by default the compressed model's.
        overwrite: replace a folder that an export has written.

    Raises:
        CompressionError: `folder` is no compressed model, `out` cannot be written, or the dtype is unknown. Nothing has
            been written.
    """
    source, target = Path(folder), Path(out)
    config = check_export(source, target, dtype=dtype, overwrite=overwrite)
    with stage("loading and decoding"):
        dense = dense_model(source, dtype=dtype or str(config.get("dtype") or "float32"))
    with whole_folder(target, is_export if overwrite else None, keep_own) as partial:
        with stage(f"saving {target.name}"):
            dense.save_pretrained(partial)
        copy_companions(source, partial)
        if (source / REPORT_FILE).is_file():
            shutil.copyfile(source / REPORT_FILE, partial / REPORT_FILE)
        (partial / EXPORT_FILE).write_text(_record(source, config, dense), "utf-8")
    return target


def check_export(
    folder: str | Path, out: str | Path, *, dtype: str | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Return the compressed folder's config if `export_folder` could write it, without torch; see there.

    Raises:
        CompressionError: it could not.
    """
    config = compressed_config(Path(folder))
    check_weights(Path(folder), ADVICE)
    if dtype is not None and dtype not in STORAGES:
        raise CompressionError(f"The dtype '{dtype}' is not supported; supported are {listing(STORAGES)}.")
    if dtype is None and str(config.get("dtype") or "float32") not in STORAGES:
        raise CompressionError(
            f"The config.json of '{Path(folder).name}' names the dtype {config['dtype']!r}, which is not supported; pass "
            f"--dtype (dtype=), one of {listing(STORAGES)}."
        )
    check_target(Path(folder), Path(out), overwrite)
    return config


def dense_model(folder: str | Path, *, dtype: str = "float32") -> PreTrainedModel:
    """Return the stock model that a compressed folder stands for, in evaluation mode, on the CPU.

    Weights are decoded in float32, whatever the dtype, and rounded once.

    Args:
        folder: a compressed model.
        dtype: of the result.

    Raises:
        CompressionError: it is no compressed model, or some of its weights are missing.
    """
    return stock_model(compressed_model(folder), dtype)


def compressed_model(folder: str | Path) -> PreTrainedModel:
    """Return a compressed folder's model in float32, in evaluation mode, on the CPU.

    Raises:
        CompressionError: it is no compressed model, or some of its weights are missing.
    """
    import torch

    from .. import registration

    source = Path(folder)
    config = compressed_config(source)
    name = str(config["architectures"][0])
    what = f"'{source.name}' does not load as {name} from its config.json and weights"
    with quiet_transformers(), refusing(what, ADVICE):
        compressed, info = registration.public(name).from_pretrained(
            source, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )
    check_fit(info, what, ADVICE)
    if missing := sorted(info["missing_keys"]):
        raise CompressionError(
            f"{what}: {listing(missing[:3])}{' …' if len(missing) > 3 else ''} are missing. {ADVICE}"
        )
    model: PreTrainedModel = compressed.eval()
    return model


def stock_model(compressed: PreTrainedModel, dtype: str = "float32") -> PreTrainedModel:
    """Return the stock model that a compressed one stands for, in evaluation mode, on the CPU."""
    import torch
    import transformers

    stock = getattr(transformers, type(compressed).__name__.removeprefix(CLASS_PREFIX))
    model_type = str(compressed.config.model_type).removeprefix(TYPE_PREFIX)
    values = {key: value for key, value in compressed.config.to_dict().items() if key not in NOT_CARRIED}
    stock_config = stock.config_class(**values)
    stock_config.architectures = [stock.__name__]
    family, absent = FAMILIES[model_type], compressed.config.compression["absent"]
    layout = layout_of_config(stock_config.to_dict(), stock.__name__, absent)
    with quiet_transformers():
        dense, info = stock.from_pretrained(
            None,
            config=stock_config,
            state_dict=dense_state(compressed, layout),
            dtype=getattr(torch, dtype),
            output_loading_info=True,
        )
    if absent:
        info["missing_keys"] = drop_absent(dense, family.entry, info["missing_keys"])
    problems = {key: sorted(info[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[key]}
    if problems:
        raise RuntimeError(f"The stock {stock.__name__} does not take the decoded weights: {problems}.")
    dense.config.name_or_path = ""
    if dense.can_generate() and compressed.generation_config is not None:
        dense.generation_config = compressed.generation_config
    return dense.eval()


def dense_state(model: PreTrainedModel, layout: ParameterLayout) -> dict[str, Tensor]:
    """Return the tensors of the stock model that a compressed one stands for, by their names there.

    Args:
        model: compressed.
        layout: the stock model's parameters and matrices.
    """
    import torch

    from ..runtime.layers_compressed import FusedLinear
    from ..runtime.weights_compressed import CompressedWeight

    kept = {name: tensor for name, tensor in model.state_dict().items() if name in layout.parameters}
    parts: dict[str, list[Any]] = {}
    with torch.no_grad():
        for matrix in layout.matrices:
            name = matrix.full_module(layout.prefix)
            module: Any = model.get_submodule(name)
            if isinstance(module, FusedLinear):
                parts.setdefault(name, []).append(module[str(matrix.part)])
                # [out, in] of each part so far, one below the other, as the fused layer has them
                kept[f"{name}.weight"] = matrix.as_stored(torch.cat([_weight(part) for part in parts[name]]))
                if matrix.bias:
                    kept[f"{name}.bias"] = torch.cat([part.bias for part in parts[name]])
            elif isinstance(module, CompressedWeight):
                kept[f"{name}.weight"] = matrix.as_stored(module.dense_weight())
    return {name: tensor.detach() for name, tensor in kept.items()}


def _weight(module: Any) -> Tensor:
    """Return the weight [out, in] of a linear layer, compressed or not."""
    weight: Tensor = module.dense_weight() if hasattr(module, "dense_weight") else module.weight
    return weight


def check_target(source: Path, target: Path, overwrite: bool) -> None:
    """Raise CompressionError unless an export can be written there."""
    if target.resolve() == source.resolve() or source.resolve() in target.resolve().parents:
        raise CompressionError(f"The output folder '{target}' is, or lies in, the compressed one; pass another.")
    files.check_target(target, overwrite, is_export, "an export", [source])


def is_export(folder: Path) -> bool:
    """Return whether a folder was written by an export."""
    return (folder / EXPORT_FILE).is_file()


def keep_own(old: Path, new: Path) -> None:
    """Keep the user's own files of an export that is replaced."""
    keep_others(old, new, lambda name: bool(name in COMPANIONS or WRITTEN.fullmatch(name)))


def _record(source: Path, config: Mapping[str, Any], dense: PreTrainedModel) -> str:
    """Return the record of an export."""
    from ..version import __version__

    content = {
        "exported_from": source.resolve().name,
        "compressed_class": config["architectures"][0],
        "architecture": type(dense).__name__,
        "dtype": str(dense.dtype).removeprefix("torch."),
        "hf-offline-compress": __version__,
    }
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
