"""Kronecker: Ŵ = Σᵣ Aᵣ ⊗ Bᵣ, cropped to [rows, columns]."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, isqrt, sqrt
from typing import Any, ClassVar

from .base import GroupShape, Size, Structure, integer
from .storage import Stored

Sides = tuple[int, int]
# A divisor this far from the root, as a factor, is still preferred to cropping.
NEAR = 2.0


@dataclass(frozen=True)
class Kronecker(Structure):
    """A sum of Kronecker products; each member has Aᵣ of its own, and a group shares the Bᵣ.

    In L2 the best answer is an SVD of the rearranged matrix (Van Loan & Pitsianis 1993).

    Attributes:
        polish: steps of training after that start, by the objective's loss; 0 for none. L2 without row weights, on sides
            that are not cropped, needs none: the start is the best.
    """

    name: ClassVar[str] = "kronecker"
    title: ClassVar[str] = "Kronecker"
    reference: ClassVar[str] = "Van Loan & Pitsianis, Approximation with Kronecker products, 1993"
    objectives: ClassVar[tuple[str, ...]] = ("l2", "cosine", "l1", "importance", "parameter_wise")
    unit: ClassVar[str] = "terms"

    polish: int = 100

    def sides(self, shape: GroupShape) -> tuple[Sides, Sides]:
        """Return the shapes of one member's A and of B.

        Sides that divide the matrix's are preferred, near their roots. The longer factor of the rows goes with the shorter
        one of the columns, so that A and B are of like size: that gives the most terms.
        """
        rows, columns = sorted(_near_root(shape.rows)), sorted(_near_root(shape.columns))
        if shape.members > 1:  # the A of all members lie along one side of the rearranged matrix: B had better be large
            return (rows[0], columns[0]), (rows[1], columns[1])
        return (rows[0], columns[1]), (rows[1], columns[0])

    def member_tensors(self, size: Size, shape: GroupShape) -> dict[str, Stored]:
        """Return the left factors of one member; see the base class."""
        size = integer(size)
        return {"left": Stored((size, *self.sides(shape)[0]))}

    def decoder_tensors(self, size: Size, shape: GroupShape) -> dict[str, Stored]:
        """Return the right factors; see the base class."""
        size = integer(size)
        return {"right": Stored((size, *self.sides(shape)[1]))}

    def limit(self, shape: GroupShape) -> int:
        """Return the full rank of the rearranged matrix; see the base class."""
        (a, b), (c, d) = self.sides(shape)
        return min(shape.members * a * b, c * d)

    def runtime(self, size: Size, shape: GroupShape) -> dict[str, Any]:
        """Return what the runtime layer is built from; see the base class."""
        size = integer(size)
        left, right = self.sides(shape)
        return {"structure": "kronecker", "terms": size, "left": list(left), "right": list(right)}


def _near_root(side: int) -> Sides:
    """Return two factors near √side: of equal product where divisors lie near, else their product is a little larger."""
    root = isqrt(side)
    divisor = next(d for d in range(root, 0, -1) if side % d == 0)
    if divisor * NEAR >= sqrt(side):
        return divisor, side // divisor
    near = ceil(sqrt(side))
    return ceil(side / near), near
