"""How large all weights together may be."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import CompressionError
from ..foundation.arguments import real
from ..foundation.parsing import parse_bytes


@dataclass(frozen=True)
class Budget:
    """How large all weights together may be, with everything in their files; one of the two.

    Attributes:
        total_ratio: 4 bytes × all parameters of the base, over the bytes of all weight files.
        max_bytes: bytes of all weight files.
    """

    total_ratio: float | None = None
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        """Reject two budgets, none, and those that nothing fits into."""
        if (self.total_ratio is None) == (self.max_bytes is None):
            raise CompressionError("A budget is either a total_ratio or max_bytes; give one of them.")
        if self.total_ratio is not None and not self.total_ratio > 1:
            raise CompressionError(
                f"The total_ratio {self.total_ratio} would not make the model smaller; it must be above 1."
            )
        if self.max_bytes is not None and self.max_bytes < 1:
            raise CompressionError(f"max_bytes is {self.max_bytes}; it must be above 0, e.g. 6MB.")

    def allowed(self, parameters: int) -> int:
        """Return how many bytes the weight files of a model with so many parameters may have."""
        return self.max_bytes if self.max_bytes is not None else int(parameters * 4 / float(self.total_ratio or 1))

    def __str__(self) -> str:
        """Return the budget as it is asked for."""
        return f"total ratio {self.total_ratio:g}" if self.total_ratio else f"{self.max_bytes:,} bytes"


def budget_of(total_ratio: object = None, max_bytes: object = None) -> Budget:
    """Return a budget from what users write: numbers of any kind, and bytes as "6MB" too.

    Raises:
        CompressionError: a value is no number or size, or there is not exactly one.
    """
    return Budget(
        None if total_ratio is None else real(total_ratio, "total_ratio"),
        None if max_bytes is None else parse_bytes(max_bytes),
    )
