"""A base or a tokenizer passed in Python: errors name what to pass instead of anything else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..architectures.families import FAMILIES
from ..errors import CompressionError, listing

# Classes of wrapped models, by name since their libraries need not be there, and what to pass in their place.
WRAPPED = {
    "DataParallel": "pass the model in it, `model.module`",
    "DistributedDataParallel": "pass the model in it, `model.module`",
    "FullyShardedDataParallel": "pass the model in it, `model.module`",
    "OptimizedModule": "pass the model before torch.compile, `model._orig_mod`",
    "SentenceTransformer": "pass its folder or Hub id, or the transformer in it, `model[0].auto_model`",
    "CrossEncoder": "pass the transformer in it, `model.model`",
}

QUANTIZED = ("torch.ao.nn.", "torch.nn.quantized", "torchao.", "bitsandbytes.", "optimum.quanto")


def check_base(base: object) -> None:
    """Raise CompressionError unless this is a Hub id, a folder, or a model of transformers in full precision."""
    if isinstance(base, str | Path):
        return
    from torch import nn
    from transformers import PreTrainedModel

    name = type(base).__name__
    kinds = {cls.__name__ for cls in type(base).__mro__}
    if wrapped := next((WRAPPED[kind] for kind in WRAPPED if kind in kinds), None):
        raise CompressionError(f"A {name} cannot be compressed; {wrapped}.")
    if isinstance(base, nn.Module) and (hasattr(base, "peft_config") or _has_modules(base, ("peft.",))):
        raise CompressionError(
            f"This {name} has PEFT adapters; merge them into the model first, `model = model.merge_and_unload()`, and pass "
            "that."
        )
    if isinstance(base, nn.Module) and _has_modules(base, QUANTIZED):
        raise CompressionError(f"This {name} is quantized already; pass the original model in full precision.")
    if isinstance(base, PreTrainedModel):
        return
    inner = getattr(base, "model", None)
    hint = ", such as its `.model`" if isinstance(inner, PreTrainedModel) else ""
    raise CompressionError(
        f"A {name} cannot be compressed; pass a Hub id, a folder, or a transformers model{hint}, with one of the architectures "
        f"{listing(FAMILIES)}."
    )


def check_tokenizer(tokenizer: Any) -> None:
    """Raise CompressionError unless this is a tokenizer of transformers, or None."""
    if tokenizer is not None and not (callable(tokenizer) and hasattr(tokenizer, "all_special_ids")):
        raise CompressionError(
            f"`tokenizer` must be a transformers tokenizer, not a {type(tokenizer).__name__}; AutoTokenizer.from_pretrained "
            "loads one."
        )


def _has_modules(model: Any, packages: tuple[str, ...]) -> bool:
    return any(type(module).__module__.startswith(packages) for module in model.modules())
