"""Trellis: each code and its predecessors index a large table of weights."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any, ClassVar

from ..errors import CompressionError
from .base import GroupShape, Mixture, Size, Structure
from .storage import Stored

# Step of the rate → weights a code stands for, and bits of a code: half a bit a weight, 1, 1.5, … 4, 5, 6.
RATES = {1: (2, 1), 2: (2, 2), 3: (2, 3), 4: (2, 4), 5: (2, 5), 6: (2, 6), 7: (2, 7), 8: (2, 8), 9: (1, 5), 10: (1, 6)}
# Step of the rate → mean squared error of standard normal numbers, with 10 bits of a state or the least that a rate takes;
# benchmarks/trellis_distortion.py measures them. By the theory of rate and distortion none can be below 4^−bits.
DISTORTIONS = {
    0: 1.0,
    1: 0.563,
    2: 0.293,
    3: 0.153,
    4: 0.0789,
    5: 0.0419,
    6: 0.0209,
    7: 0.0105,
    8: 0.00524,
    9: 0.00188,
    10: 0.00048,
}
# Classes of rows that have a rate of their own.
MOST_CLASSES = 16
# Minimum bits of a state older than the newest code; with fewer there is no path to choose.
LEAST_MEMORY = 4


@dataclass(frozen=True)
class Trellis(Structure):
    """Trellis-coded quantization: ŵ = scale · table[last L bits of the stream of codes].

    The codes of `run` neighbouring rows form one stream: the first `width` columns of all of them, then the next columns.
    Codes overlap in the table's index, so that a few bits a weight choose among many values; encoding finds the best
    stream as a path through a trellis. The table is computed, not stored. The few weights that no entry comes near are
    kept apart, as they are. Rows of an embedding that matter more may have higher rates (`Mixture`).

    Attributes:
        state_bits: bits L of a state; the table has 2ᴸ entries. Encoding takes time in proportion.
        run: rows of a stream.
        outliers: share of the weights that are kept apart.
    """

    name: ClassVar[str] = "trellis"
    title: ClassVar[str] = "Trellis code"
    reference: ClassVar[str] = (
        "Tseng et al., QTIP - Quantization with Trellises and Incoherence Processing, NeurIPS 2024"
    )
    objectives: ClassVar[tuple[str, ...]] = ("l2", "calibrated", "sensitive", "importance")
    unit: ClassVar[str] = "bits a weight"
    shares: ClassVar[bool] = False
    known_gains: ClassVar[bool] = True
    least_rows: ClassVar[int] = 16  # a path needs room; and what is so small saves nothing

    state_bits: int = 10
    run: int = 64
    outliers: float = 0.0005

    def __post_init__(self) -> None:
        """Reject states that are too small or too many, and shares that are none."""
        if not 8 <= self.state_bits <= 14:
            raise CompressionError(f"state_bits is {self.state_bits}; it must be from 8 to 14.")
        if self.run < 1:
            raise CompressionError(f"run is {self.run}; it must be at least 1.")
        if not 0 <= self.outliers <= 0.05:
            raise CompressionError(f"outliers is {self.outliers}; it must be a share from 0 to 0.05.")

    def rows_a_stream(self, shape: GroupShape) -> int:
        """Return how many rows share a stream: about `run`, and all streams alike."""
        return ceil(shape.rows / ceil(shape.rows / self.run))

    def outlier_count(self, shape: GroupShape) -> int:
        """Return how many weights of a member are kept apart."""
        return round(self.outliers * shape.rows * shape.columns)

    def mixture(self, size: Size, shape: GroupShape) -> Mixture:
        """Return the classes and rates of a size; of a number, the one rate that it stands for."""
        if isinstance(size, Mixture):
            return size
        return Mixture(((size, self.streams(shape)),))

    def streams(self, shape: GroupShape) -> int:
        """Return into how many streams the rows are cut."""
        return ceil(shape.rows / self.rows_a_stream(shape))

    def member_tensors(self, size: Size, shape: GroupShape) -> dict[str, Stored]:
        """Return packed codes, scales, classes and outliers; see the base class."""
        classes = self.mixture(size, shape).classes
        tensors = {
            "codes": Stored((sum(streams * self.stream_bytes(step, shape) for step, streams in classes),), "uint8"),
            "scales": Stored((shape.rows,), "uint8"),
            "scale_range": Stored((2,)),
        }
        if len(classes) > 1:
            tensors["classes"] = Stored((ceil(shape.rows * index_bits(len(classes)) / 8),), "uint8")
        if count := self.outlier_count(shape):
            for name, entries in (("outlier_rows", shape.rows), ("outlier_columns", shape.columns)):
                tensors[name] = Stored((ceil(count * index_bits(entries) / 8),), "uint8")
            tensors["outlier_values"] = Stored((count,))
        return tensors

    def stream_bytes(self, step: int, shape: GroupShape) -> int:
        """Return the bytes of a stream at a step of the rate."""
        width, bits = RATES[step]
        return ceil(ceil(shape.columns / width) * self.rows_a_stream(shape) * bits / 8)

    def limit(self, shape: GroupShape) -> int:
        """Return the largest rate; see the base class."""
        return max(RATES)

    def shown(self, size: Size, shape: GroupShape) -> float:
        """Return the mean bits of codes a weight; see the base class."""
        stored = self.member_tensors(size, shape)["codes"].count
        return round(8 * stored / (shape.rows * shape.columns), 2)

    def runtime(self, size: Size, shape: GroupShape) -> dict[str, Any]:
        """Return what the runtime layer is built from; see the base class."""
        return {
            "structure": "trellis",
            "run": self.rows_a_stream(shape),
            "outliers": self.outlier_count(shape),
            "classes": [{"streams": streams, **self.code(step)} for step, streams in self.mixture(size, shape).classes],
        }

    def code(self, step: int) -> dict[str, int]:
        """Return weights a code, bits of a code, and bits of a state."""
        width, bits = RATES[step]
        return {"width": width, "bits": bits, "state_bits": max(self.state_bits, bits + LEAST_MEMORY)}


def index_bits(entries: int) -> int:
    """Return how many bits an index of so many entries takes."""
    return max(1, (entries - 1).bit_length())


def bits_a_weight(size: int) -> float:
    """Return the bits of a code a weight, at a step of the rate."""
    width, bits = RATES[size]
    return bits / width
