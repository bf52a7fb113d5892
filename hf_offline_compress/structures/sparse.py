"""Sparse: the weights that matter most, the others zero."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any, ClassVar

from .base import GroupShape, Size, Structure, integer
from .storage import FLOATS, Storage, Stored

MAX_GAP_BITS = 16
NUMBER_BITS = 16  # of a stored value, where the best width of gaps is looked for


@dataclass(frozen=True)
class Sparse(Structure):
    """Magnitude pruning (Han et al. 2015), or pruning by importance.

    Kept compactly: the values, and for each the gap to the one before, in row-major order, packed into a few bits. Where
    a gap is too long for them, zeros are stored on the way, so the number of stored values, which is the size, is what a
    budget gives, and the number of kept weights a little less.

    Attributes:
        compact: store only what is kept; else the matrix with its zeros, which is no smaller than before.
    """

    name: ClassVar[str] = "sparse"
    title: ClassVar[str] = "Sparse"
    reference: ClassVar[str] = "Han et al., Learning both weights and connections, NeurIPS 2015"
    objectives: ClassVar[tuple[str, ...]] = ("l2", "calibrated", "importance", "parameter_wise")
    unit: ClassVar[str] = "values"
    shares: ClassVar[bool] = False

    compact: bool = True

    def gap_bits(self, size: int, shape: GroupShape) -> int:
        """Return the width of a gap at which the fewest bits are stored, if weights were kept at random places."""
        density = min(1.0, size / shape.parameters)

        def bits_a_weight(width: int) -> float:
            too_long = (1 - density) ** (2**width)
            return (NUMBER_BITS + width) * (1 + too_long / (1 - too_long)) if too_long < 1 else float("inf")

        return min(range(1, MAX_GAP_BITS + 1), key=bits_a_weight)

    def member_tensors(self, size: Size, shape: GroupShape) -> dict[str, Stored]:
        """Return values and packed gaps, or the matrix; see the base class."""
        size = integer(size)
        if not self.compact:
            return {"values": Stored((shape.rows, shape.columns))}
        return {"values": Stored((size,)), "gaps": Stored((ceil(size * self.gap_bits(size, shape) / 8),), "uint8")}

    def limit(self, shape: GroupShape) -> int:
        """Return the number of weights; see the base class."""
        return shape.rows * shape.columns

    def fit(self, shape: GroupShape, budget: int, storage: Storage) -> int:
        """Return how many values are stored; with zeros stored, how many would fit if zeros were free."""
        return super().fit(shape, budget, storage) if self.compact else budget // FLOATS[storage.dtype]

    def runtime(self, size: Size, shape: GroupShape) -> dict[str, Any]:
        """Return what the runtime layer is built from; see the base class."""
        size = integer(size)
        return {
            "structure": "sparse",
            "values": size if self.compact else None,
            "gap_bits": self.gap_bits(size, shape) if self.compact else 0,
        }
