"""Codebook: an autoencoder with discrete latents - every few weights of a row are an index into a shared table."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any, ClassVar

from ..errors import CompressionError
from .base import GroupShape, Size, Structure, integer
from .storage import Stored

MAX_BITS = 12


@dataclass(frozen=True)
class Codebook(Structure):
    """Vector quantization: ŵᵢ = sᵢ · (c[code₁], c[code₂], …), a scale a row and a table of 2ᵇ entries for the group.

    With several books, each sub-vector is the sum of one entry of each (residual, or additive, quantization). A weight
    takes `books` · `size` / `width` bits, besides scales and tables.

    Attributes:
        width: weights that one code stands for.
        books: tables whose entries are added.
        rounds: how often codes and tables are made anew from each other.
    """

    name: ClassVar[str] = "codebook"
    title: ClassVar[str] = "Codebook"
    reference: ClassVar[str] = "van Baalen et al., GPTVQ - The Blessing of Dimensionality for LLM Quantization, 2024"
    objectives: ClassVar[tuple[str, ...]] = ("l2", "calibrated", "sensitive", "importance")
    unit: ClassVar[str] = "bits of a code"

    width: int = 4
    books: int = 1
    rounds: int = 3

    def __post_init__(self) -> None:
        """Reject what is less than one."""
        for name in ("width", "books", "rounds"):
            if getattr(self, name) < 1:
                raise CompressionError(f"{name} is {getattr(self, name)}; it must be at least 1.")

    def codes(self, shape: GroupShape) -> int:
        """Return how many codes a row has."""
        return ceil(shape.columns / self.width) * self.books

    def member_tensors(self, size: Size, shape: GroupShape) -> dict[str, Stored]:
        """Return codes packed by rows, and scales; see the base class."""
        size = integer(size)
        return {
            "codes": Stored((shape.rows, ceil(self.codes(shape) * size / 8)), "uint8"),
            "scales": Stored((shape.rows,)),
        }

    def decoder_tensors(self, size: Size, shape: GroupShape) -> dict[str, Stored]:
        """Return the tables; see the base class."""
        size = integer(size)
        return {"tables": Stored((self.books, 2**size, self.width))}

    def limit(self, shape: GroupShape) -> int:
        """Return the most bits of a code; see the base class."""
        return MAX_BITS

    def runtime(self, size: Size, shape: GroupShape) -> dict[str, Any]:
        """Return what the runtime layer is built from; see the base class."""
        size = integer(size)
        return {"structure": "codebook", "bits": size, "width": self.width, "books": self.books}
