"""Low rank: Ŵ = Z B, latents Z [rows, rank] and a basis B [rank, columns]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import CompressionError
from .base import GroupShape, Size, Structure, integer
from .storage import Stored

MAX_COLUMNS = 2**15 - 1


@dataclass(frozen=True)
class LowRank(Structure):
    """A factorization into two matrices, solved in closed form (Eckart & Young 1936).

    Attributes:
        identity_block: of the rank × columns numbers of B, rank² are free to choose, since Z B = (Z A)(A⁻¹ B). Choose
            them to make rank columns of B an identity, and do not store it: a rank then costs rank² numbers less, and
            never more than the dense matrix (an interpolative decomposition of Ŵ; Cheng et al. 2005).
    """

    name: ClassVar[str] = "low_rank"
    title: ClassVar[str] = "Low rank"
    reference: ClassVar[str] = "Eckart & Young, The approximation of one matrix by another of lower rank, 1936"
    objectives: ClassVar[tuple[str, ...]] = ("l2", "calibrated", "sensitive", "importance")
    unit: ClassVar[str] = "rank"
    mixes_outputs: ClassVar[bool] = True
    known_gains: ClassVar[bool] = True

    identity_block: bool = False

    def member_tensors(self, size: Size, shape: GroupShape) -> dict[str, Stored]:
        """Return the latents of one member; see the base class."""
        size = integer(size)
        return {"latents": Stored((shape.rows, size))}

    def decoder_tensors(self, size: Size, shape: GroupShape) -> dict[str, Stored]:
        """Return the basis, [columns, rank] as a linear layer keeps it; see the base class.

        With an identity block, `order` holds the columns, those of the block first.
        """
        size = integer(size)
        if not self.identity_block:
            return {"weight": Stored((shape.columns, size))}
        return {"weight": Stored((shape.columns - size, size)), "order": Stored((shape.columns,), "int16")}

    @property
    def known_rounding(self) -> bool:
        """Whether what rounding adds is known; see the base class."""
        return not self.identity_block

    def limit(self, shape: GroupShape) -> int:
        """Return the full rank; see the base class."""
        return min(shape.all_rows, shape.columns)

    def check(self, shape: GroupShape) -> None:
        """Raise where positions would not fit into int16; see the base class."""
        super().check(shape)
        if self.identity_block and shape.columns > MAX_COLUMNS:
            raise CompressionError(
                f"An identity block needs at most {MAX_COLUMNS} columns, for positions in int16; a matrix has "
                f"{shape.columns}."
            )

    def runtime(self, size: Size, shape: GroupShape) -> dict[str, Any]:
        """Return what the runtime layer is built from; see the base class."""
        size = integer(size)
        return {
            "structure": "low_rank",
            "latent": size,
            "decoder_bias": False,
            "identity_block": self.identity_block,
        }
