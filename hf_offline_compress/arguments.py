"""What callers in Python pass: NumPy's numbers are numbers; for what is no model, what to pass instead is said."""

from __future__ import annotations

from numbers import Integral, Real
from pathlib import Path
from typing import Any

from .errors import CompressionError, listing
from .families import FAMILIES

LARGEST_SEED = 2**32 - 1
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


def real(value: object, label: str) -> float:
    """Return a plain number.

    Raises:
        CompressionError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise CompressionError(f"`{label}` must be a number, not {value!r}.")
    return int(value) if isinstance(value, Integral) else float(value)


def whole(value: object, label: str, least: int, most: int | None = None) -> int:
    """Return a plain whole number.

    Raises:
        CompressionError: it is none, or out of bounds.
    """
    bounds = f"of {least:,} or more" if most is None else f"from {least:,} to {most:,}"
    number = int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None
    if number is None or number < least or (most is not None and number > most):
        raise CompressionError(f"`{label}` must be a whole number {bounds}, not {value!r}.")
    return number


def seed_of(value: object) -> int:
    """Return a seed that all generators of random numbers take.

    Raises:
        CompressionError: it is no whole number, or out of bounds.
    """
    return whole(value, "seed", 0, LARGEST_SEED)


def token_of(token: Any) -> Any:
    """Return a token for the Hub without the blanks and ends of lines that copying leaves around it; others as they are.

    Raises:
        CompressionError: it is empty, or no request could carry it.
    """
    if not isinstance(token, str):
        return token
    stripped = token.strip()
    if not stripped:
        raise CompressionError("The token for the Hub is empty; pass one, or leave `token` (--token) out.")
    if not (stripped.isascii() and stripped.isprintable()) or " " in stripped:
        raise CompressionError(
            "The token for the Hub has a blank, an end of line, or another character in it that no token has; copy it anew from "
            "https://huggingface.co/settings/tokens."
        )
    return stripped


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
            f"This {name} has adapters of PEFT; merge them into the model first, `model = model.merge_and_unload()`, and pass "
            "that."
        )
    if isinstance(base, nn.Module) and _has_modules(base, QUANTIZED):
        raise CompressionError(f"This {name} is quantized already; pass the model from before, in full precision.")
    if isinstance(base, PreTrainedModel):
        return
    inner = getattr(base, "model", None)
    hint = ", such as its `.model`" if isinstance(inner, PreTrainedModel) else ""
    raise CompressionError(
        f"A {name} cannot be compressed; pass a Hub id, a folder, or a model of transformers{hint}, of one of the architectures "
        f"{listing(FAMILIES)}."
    )


def check_tokenizer(tokenizer: Any) -> None:
    """Raise CompressionError unless this is a tokenizer of transformers, or None."""
    if tokenizer is not None and not (callable(tokenizer) and hasattr(tokenizer, "all_special_ids")):
        raise CompressionError(
            f"`tokenizer` must be a tokenizer of transformers, not a {type(tokenizer).__name__}; AutoTokenizer.from_pretrained "
            "loads one."
        )


def _has_modules(model: Any, packages: tuple[str, ...]) -> bool:
    return any(type(module).__module__.startswith(packages) for module in model.modules())
