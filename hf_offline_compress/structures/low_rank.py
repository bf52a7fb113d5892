"""Low rank: Ŵ = Z B, latents Z [rows, rank] and a basis B [rank, columns]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import CompressionError
from .base import Shape, Structure

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
    objectives: ClassVar[tuple[str, ...]] = ("l2", "calibrated", "sensitive")
    known_gains: ClassVar[bool] = True

    identity_block: bool = False

    def member_tensors(self, size: int, rows: int, columns: int) -> dict[str, Shape]:
        """Return the latents of one member; see the base class."""
        return {"latents": (rows, size)}

    def decoder_tensors(self, size: int, columns: int) -> dict[str, Shape]:
        """Return the basis, [columns, rank] as a linear layer keeps it; see the base class."""
        return {"weight": (columns - size if self.identity_block else columns, size)}

    def index_tensors(self, size: int, columns: int) -> dict[str, Shape]:
        """Return the order of the columns: those of the identity block first; see the base class."""
        if self.identity_block and columns > MAX_COLUMNS:
            raise CompressionError(
                f"An identity block needs at most {MAX_COLUMNS} columns, for positions in int16; a matrix has {columns}."
            )
        return {"order": (columns,)} if self.identity_block else {}

    def runtime(self, size: int) -> dict[str, Any]:
        """Return what the runtime layer is built from; see the base class."""
        return {
            "structure": "low_rank",
            "latent": size,
            "decoder_bias": False,
            "identity_block": self.identity_block,
        }
