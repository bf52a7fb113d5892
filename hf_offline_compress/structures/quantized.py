"""Quantized: every weight an integer of few bits, with a scale and a zero for a row or a part of one."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any, ClassVar

from ..errors import CompressionError
from .base import GroupShape, Size, Structure, integer
from .storage import Stored

MIN_BITS, MAX_BITS = 2, 8


@dataclass(frozen=True)
class Quantized(Structure):
    """Rounding to 2ᵇ evenly spaced values, between the least and the largest of a group: ŵ = (code − zero / 2) · scale.

    The zero is an integer number of half steps, of b + 1 bits: at equal bytes that is closer than a minimum kept as a number.

    Attributes:
        group_size: columns that share a scale and a zero; 0 for the whole row.
        clip: let the values span less than the group does, where that is closer.
    """

    name: ClassVar[str] = "quantized"
    title: ClassVar[str] = "Quantized"
    reference: ClassVar[str] = "Frantar et al., GPTQ, ICLR 2023"
    objectives: ClassVar[tuple[str, ...]] = ("l2", "calibrated", "sensitive")
    unit: ClassVar[str] = "bits"
    minimum: ClassVar[int] = MIN_BITS
    shares: ClassVar[bool] = False
    known_gains: ClassVar[bool] = True

    group_size: int = 0
    clip: bool = False

    def __post_init__(self) -> None:
        """Reject a group of less than nothing."""
        if self.group_size < 0:
            raise CompressionError(f"group_size is {self.group_size}; it must be 0 (the whole row) or more.")

    def scales(self, shape: GroupShape) -> int:
        """Return how many scales a row has."""
        return ceil(shape.columns / self.group_size) if self.group_size else 1

    def member_tensors(self, size: Size, shape: GroupShape) -> dict[str, Stored]:
        """Return codes and zeros packed by rows, and scales; see the base class."""
        size = integer(size)
        return {
            "codes": Stored((shape.rows, ceil(shape.columns * size / 8)), "uint8"),
            "scales": Stored((shape.rows, self.scales(shape))),
            "zeros": Stored((shape.rows, ceil(self.scales(shape) * (size + 1) / 8)), "uint8"),
        }

    def limit(self, shape: GroupShape) -> int:
        """Return the most bits; see the base class."""
        return MAX_BITS

    def runtime(self, size: Size, shape: GroupShape) -> dict[str, Any]:
        """Return what the runtime layer is built from; see the base class."""
        size = integer(size)
        return {"structure": "quantized", "bits": size, "group_size": self.group_size or shape.columns}
