"""Quantized: every weight a whole number of few bits, with a scale and a minimum for a row or a part of one."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any, ClassVar

from ..errors import CompressionError
from .base import GroupShape, Stored, Structure

MIN_BITS, MAX_BITS = 2, 8


@dataclass(frozen=True)
class Quantized(Structure):
    """Rounding to the 2ᵇ evenly spaced values between the least and the largest of a row: ŵ = minimum + code · scale.

    Attributes:
        group_size: columns that share a scale and a minimum; 0 for the whole row.
    """

    name: ClassVar[str] = "quantized"
    title: ClassVar[str] = "Quantized"
    reference: ClassVar[str] = "Zafrir et al., Q8BERT, 2019"
    objectives: ClassVar[tuple[str, ...]] = ("l2",)
    unit: ClassVar[str] = "bits"
    minimum: ClassVar[int] = MIN_BITS
    shares: ClassVar[bool] = False

    group_size: int = 0

    def __post_init__(self) -> None:
        """Reject a group of less than nothing."""
        if self.group_size < 0:
            raise CompressionError(f"group_size is {self.group_size}; it must be 0 (the whole row) or more.")

    def scales(self, shape: GroupShape) -> int:
        """Return how many scales a row has."""
        return ceil(shape.columns / self.group_size) if self.group_size else 1

    def member_tensors(self, size: int, shape: GroupShape) -> dict[str, Stored]:
        """Return codes packed by rows, scales and minima; see the base class."""
        return {
            "codes": Stored((shape.rows, ceil(shape.columns * size / 8)), "uint8"),
            "scales": Stored((shape.rows, self.scales(shape))),
            "minima": Stored((shape.rows, self.scales(shape))),
        }

    def limit(self, shape: GroupShape) -> int:
        """Return the most bits; see the base class."""
        return MAX_BITS

    def runtime(self, size: int, shape: GroupShape) -> dict[str, Any]:
        """Return what the runtime layer is built from; see the base class."""
        return {"structure": "quantized", "bits": size, "group_size": self.group_size or shape.columns}
