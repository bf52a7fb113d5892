"""What the package sees of a model: its parameters, and the matrices among them.

Matrices are seen as [out, in] (embeddings as [tokens, width]): transposed and fused layers are transposed, split and
joined here and nowhere else. No torch is imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from ..structures import Shape


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
class ParameterLayout:
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
