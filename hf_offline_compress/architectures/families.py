"""The architectures that can be compressed, and what the rest of the package sees of one: parameters and matrices.

The kinds have the same names in all families; a matrix is always seen as [out, in] (an embedding as [tokens, width]), so
transposed and fused layers are transposed, split and joined here and nowhere else. No torch is needed until a layout
is asked for; see `layout.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from ..errors import CompressionError, listing
from ..runtime.architectures_compressed import ARCHITECTURES, CLASS_PREFIX, QUERY_KEY_VALUE, TYPE_PREFIX, Architecture

KINDS = (
    "word_embeddings",
    "query",
    "key",
    "value",
    "attention_output",
    "intermediate",
    "output",
    "position_embeddings",
    "pooler",
    "head",
    "gate",
    "embedding_projection",
    "position_query",
    "position_key",
)
_ATTENTION = ("query", "key", "value", "attention_output", "position_query", "position_key")
_FEED_FORWARD = ("intermediate", "output", "gate")
SHORTHANDS = {
    "attention": _ATTENTION,
    "feed_forward": _FEED_FORWARD,
    "linears": (*_ATTENTION, *_FEED_FORWARD),
    "all": KINDS,
}
# Kinds of one module's neighbours that are applied to the same inputs.
SAME_INPUTS = (QUERY_KEY_VALUE, ("gate", "intermediate"))
# How names of classes end that predict masked tokens, or the next one.
_MASKED_HEADS = ("ForMaskedLM", "ForPreTraining")
_CAUSAL_HEADS = ("LMHeadModel", "ForCausalLM")


@dataclass(frozen=True)
class Family:
    """An architecture: its entry in the table, and the heads that the installed transformers has for it."""

    model_type: str
    entry: Architecture

    @property
    def title(self) -> str:
        """How texts call it."""
        return self.entry.title

    @property
    def base_class(self) -> str:
        """The stock class without a head."""
        return self.entry.base

    @cached_property
    def heads(self) -> tuple[str, ...]:
        """Stock classes of the family: the base, those of auto classes, and those that no auto class has."""
        from transformers.models.auto import modeling_auto

        found = [self.entry.base]
        for name, mapping in vars(modeling_auto).items():
            if name.startswith("MODEL_") and name.endswith("_MAPPING_NAMES"):
                classes = mapping.get(self.model_type, ())
                found += [classes] if isinstance(classes, str) else list(classes)
        return tuple(name for name in dict.fromkeys((*found, *self.entry.heads)) if self.owns(name))

    def owns(self, architecture: str) -> bool:
        """Return whether a class is named as the family's are; known without transformers."""
        stem = re.escape(self.entry.base.removesuffix("Model"))
        return re.fullmatch(rf"{stem}(Model|LMHeadModel|For[A-Z]\w+)", architecture) is not None or (
            architecture in self.entry.heads
        )

    def check_owns(self, architecture: str) -> None:
        """Raise CompressionError unless a stock class is one of the family's heads."""
        if architecture not in self.heads:
            raise CompressionError(
                f"'{architecture}' is not an architecture of {self.title} that can be compressed; "
                f"known: {listing(self.heads)}. Pass auto_class to choose one."
            )


FAMILIES = {model_type: Family(model_type, entry) for model_type, entry in ARCHITECTURES.items()}


def objective_of(architecture: str) -> Literal["masked", "causal", "discriminative"] | None:
    """Return what a stock class, or the compressed one of it, was trained to tell of tokens: those masked, or the next.

    A discriminative one tells whether a token was replaced; None stands for all others.
    """
    if any(architecture.removeprefix(CLASS_PREFIX) in entry.discriminative for entry in ARCHITECTURES.values()):
        return "discriminative"
    if architecture.endswith(_CAUSAL_HEADS):
        return "causal"
    return "masked" if architecture.endswith(_MASKED_HEADS) else None


def is_language_model(architecture: str) -> bool:
    """Return whether a stock class predicts tokens, masked ones or the next."""
    return objective_of(architecture) in ("masked", "causal")


def family_of(config: Mapping[str, Any]) -> Family:
    """Return the family that a `config.json` belongs to.

    Raises:
        CompressionError: the model is compressed or quantized already, its outputs have no names, or its architecture is not
            supported.
    """
    model_type = config.get("model_type")
    if config.get("compression") or str(model_type).startswith(TYPE_PREFIX):
        raise CompressionError(
            "This model is compressed already; pass the base model it was made from (`hf-offline-compress inspect` names it)."
        )
    if config.get("quantization_config"):
        raise CompressionError(
            "This model is quantized already (its config has a `quantization_config`); pass its full-precision base."
        )
    if config.get("return_dict") is False:
        raise CompressionError(
            "The base's config sets `return_dict` to false, so that its outputs have no names; set it to true, which changes "
            "nothing else."
        )
    if model_type not in FAMILIES:
        raise CompressionError(
            f"The architecture '{model_type}' is not supported; supported are {listing(FAMILIES)} (as `model_type`)."
        )
    return FAMILIES[model_type]


def architecture_of(config: Mapping[str, Any], family: Family) -> str:
    """Return the stock class that a checkpoint was saved from; the base class where its config names none."""
    architectures = config.get("architectures") or [family.base_class]
    return str(architectures[0])
