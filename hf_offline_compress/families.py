"""The architectures that can be compressed, and what the rest of the package sees of one: parameters and matrices.

The kinds have the same names in all families; a matrix is always seen as [out, in] (an embedding as [tokens, width]), so
transposed and fused layers are turned and cut here, and joined again, and nowhere else. No torch is needed until a layout
is asked for; see `layout.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any, Literal

from .errors import CompressionError, listing
from .runtime.architectures_compressed import (
    ARCHITECTURES,
    CLASS_PREFIX,
    QUERY_KEY_VALUE,
    TYPE_PREFIX,
    Architecture,
)
from .structures import Shape

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
class Matrix:
    """One weight matrix that can be compressed.

    Attributes:
        module: path of the module that holds it, without the prefix of the base model where it lies in the base.
        kind: one of `KINDS`.
        layer: index of its layer; None outside the layers.
        rows: outputs, or tokens of an embedding.
        columns: inputs, or width of an embedding.
        inputs: name of the activations it is applied to; matrices with the same inputs share their statistics.
        in_base: whether it lies in the base model (else in a head).
        embedding: whether its rows are looked up.
        bias: whether its module has a bias.
        transposed: whether the checkpoint keeps it as [in, out].
        part: of a fused module, the part that this matrix is.
        heads: attention heads that the rows are cut into; 1 where they are not.
        start: of a part, its first row in the fused module.
    """

    module: str
    kind: str
    layer: int | None
    rows: int
    columns: int
    inputs: str
    in_base: bool = True
    embedding: bool = False
    bias: bool = True
    transposed: bool = False
    part: str | None = None
    heads: int = 1
    start: int = 0

    @property
    def name(self) -> str:
        """The module's path, and behind it the part; what regular expressions of a recipe are matched against."""
        return f"{self.module}.{self.part}" if self.part else self.module

    def full_name(self, prefix: str) -> str:
        """Return the name with the base model's prefix where it lies in the base."""
        return f"{prefix if self.in_base else ''}{self.name}"

    def full_module(self, prefix: str) -> str:
        """Return the stock module's path with the base model's prefix where it lies in the base."""
        return f"{prefix if self.in_base else ''}{self.module}"

    def dense(self, state: Mapping[str, Any], prefix: str) -> Any:
        """Return the matrix [rows, columns] as a view into a checkpoint's tensors."""
        weight = state[f"{self.full_module(prefix)}.weight"]
        weight = weight.T if self.transposed else weight
        return weight[self.start : self.start + self.rows] if self.part else weight

    def dense_bias(self, state: Mapping[str, Any], prefix: str) -> Any:
        """Return its bias [rows] as a view into a checkpoint's tensors; only if it has one."""
        return state[f"{self.full_module(prefix)}.bias"][self.start : self.start + self.rows]

    def as_stored(self, weight: Any) -> Any:
        """Return a weight [rows, columns], or all parts of a fused one, as the checkpoint keeps it."""
        return (weight.T if self.transposed else weight).contiguous()


@dataclass
class Skeleton:
    """All parameters of a model, by name and shape, and the matrices among them.

    Attributes:
        prefix: what parameters of the base model begin with, e.g. ``"bert."``; empty for a base model.
        word_embeddings: module of the word embeddings, without the prefix.
        tied: whether the word embeddings also serve as the head's output matrix.
        parameters: full name → shape of every stored parameter (tied ones once, under the input's name).
        matrices: those that belong to a kind, of the base model first.
        absent: modules of the base model that this one lacks.
    """

    prefix: str
    word_embeddings: str
    tied: bool = False
    parameters: dict[str, Shape] = field(default_factory=dict)
    matrices: list[Matrix] = field(default_factory=list)
    absent: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """Number of parameters, each stored once."""
        return sum(prod(shape) for shape in self.parameters.values())

    @property
    def unknown(self) -> dict[str, Shape]:
        """Full name → shape of the parameters of two and more dimensions that are of no kind."""
        known = {f"{matrix.full_module(self.prefix)}.weight" for matrix in self.matrices}
        return {name: shape for name, shape in self.parameters.items() if len(shape) > 1 and name not in known}

    def fused_with(self, chosen: Sequence[Matrix]) -> list[Matrix]:
        """Return all parts of the fused modules that matrices lie in, chosen or not."""
        modules = {matrix.module for matrix in chosen if matrix.part}
        return [matrix for matrix in self.matrices if matrix.part and matrix.module in modules]


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

    def skeleton(self, config: Mapping[str, Any], architecture: str, absent: Sequence[str] = ()) -> Skeleton:
        """Return the parameters of `architecture` (a stock class name) under `config` (the contents of config.json).

        Args:
            config: the contents.
            architecture: the name.
            absent: optional modules of the base model that its checkpoint lacks.

        Raises:
            CompressionError: the architecture is not one of this family's, or the config does not describe one.
        """
        if architecture not in self.heads:
            raise CompressionError(
                f"'{architecture}' is not an architecture of {self.title} that can be compressed; "
                f"known: {listing(self.heads)}. Pass auto_class to choose one."
            )
        from .layout import layout_of_config

        return layout_of_config(self.entry, config, architecture, absent)


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
        CompressionError: the model is compressed or quantized already, or its architecture is not supported.
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
    if model_type not in FAMILIES:
        raise CompressionError(
            f"The architecture '{model_type}' is not supported; supported are {listing(FAMILIES)} (as `model_type`)."
        )
    return FAMILIES[model_type]


def architecture_of(config: Mapping[str, Any], family: Family) -> str:
    """Return the stock class that a checkpoint was saved from; the base class where its config names none."""
    architectures = config.get("architectures") or [family.base_class]
    return str(architectures[0])
