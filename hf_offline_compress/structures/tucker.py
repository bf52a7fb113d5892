"""Tucker: matrices as slices of a tensor, a core times a factor for each of its three sides."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from math import ceil
from typing import Any, ClassVar

from ..errors import CompressionError, needs_extra
from .base import GroupShape, Size, Structure, integer
from .storage import Stored


@dataclass(frozen=True)
class Tucker(Structure):
    """A tensor [blocks, block rows, columns] ≈ core ×₁ mixing ×₂ row factor ×₃ column factor (Tucker 1966).

    The blocks are what arXiv 2302.04045 makes them: attention heads of query, key and value; squares of an embedding, the
    last one padded with zero rows; whole matrices, where several layers are compressed together. A single matrix without
    heads would be a tensor of one block, and is kept as low rank, which is the same with fewer numbers.

    Attributes:
        polish: steps of training after the start (HOOI: De Lathauwer et al. 2000), by the objective's loss; 0 for none.
    """

    name: ClassVar[str] = "tucker"
    title: ClassVar[str] = "Tucker"
    reference: ClassVar[str] = "Tucker, Some mathematical notes on three-mode factor analysis, 1966"
    objectives: ClassVar[tuple[str, ...]] = ("l2", "cosine", "l1", "importance", "parameter_wise")
    unit: ClassVar[str] = "largest rank"

    polish: int = 100

    def require(self) -> None:
        """Raise if tensorly is not installed; see the base class."""
        if find_spec("tensorly") is None:
            raise CompressionError(needs_extra("The structure 'tucker'", "tensorly", "tucker"))

    def sides(self, shape: GroupShape) -> tuple[int, int, int]:
        """Return the tensor's sides: blocks of one member, rows of a block, columns."""
        if shape.embedding:
            height = min(shape.rows, shape.columns)
            return ceil(shape.rows / height), height, shape.columns
        heads = shape.heads if shape.rows % shape.heads == 0 else 1
        return heads, shape.rows // heads, shape.columns

    def is_matrix(self, shape: GroupShape) -> bool:
        """Whether there is only one block, and so no third side."""
        return shape.members * self.sides(shape)[0] == 1

    def ranks(self, size: int, shape: GroupShape) -> tuple[int, int, int]:
        """Return the ranks of the three sides (blocks of all members, rows, columns): `size`, or the side if it is shorter.

        Short sides, such as layers and heads, have little to spare: measured on BERT's matrices, this is close to the best
        of all triples that store as much, and far better than the same share of every side.
        """
        blocks, height, columns = self.sides(shape)
        ranks = [min(side, size) for side in (shape.members * blocks, height, columns)]
        # No side can have more directions than the core has slices for it.
        for i in range(3):
            ranks[i] = min(ranks[i], ranks[i - 1] * ranks[i - 2])
        return ranks[0], ranks[1], ranks[2]

    def member_tensors(self, size: Size, shape: GroupShape) -> dict[str, Stored]:
        """Return what mixes the core's slices into one member's blocks; see the base class."""
        size = integer(size)
        if self.is_matrix(shape):
            return {"latents": Stored((shape.rows, size))}
        return {"mixing": Stored((self.sides(shape)[0], self.ranks(size, shape)[0]))}

    def decoder_tensors(self, size: Size, shape: GroupShape) -> dict[str, Stored]:
        """Return core and factors; see the base class."""
        size = integer(size)
        if self.is_matrix(shape):
            return {"weight": Stored((shape.columns, size))}
        _, height, columns = self.sides(shape)
        ranks = self.ranks(size, shape)
        return {
            "core": Stored(ranks),
            "row_factor": Stored((height, ranks[1])),
            "column_factor": Stored((columns, ranks[2])),
        }

    def limit(self, shape: GroupShape) -> int:
        """Return the longest side; see the base class."""
        if self.is_matrix(shape):
            return min(shape.rows, shape.columns)
        blocks, height, columns = self.sides(shape)
        return max(shape.members * blocks, height, columns)

    def runtime(self, size: Size, shape: GroupShape) -> dict[str, Any]:
        """Return what the runtime layer is built from; see the base class."""
        size = integer(size)
        if self.is_matrix(shape):
            return {"structure": "low_rank", "latent": size, "decoder_bias": False, "identity_block": False}
        blocks, height, _ = self.sides(shape)
        return {"structure": "tucker", "blocks": blocks, "height": height, "ranks": list(self.ranks(size, shape))}
