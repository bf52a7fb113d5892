"""How a text is prepared for the models that are evaluated on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TextSettings:
    """How a model is evaluated on a text.

    Attributes:
        seed: of the choice of masked words.
        share: of a line's tokens that are masked.
        block: tokens of a line (by default 512) or of a causal model's window (1024), at most.
        stride: tokens between the beginnings of windows; by default half a window.
        min_tokens: lines with fewer are dropped, where words are masked.
        max_length: tokens of a text, at most, where hidden states are compared.
    """

    seed: int = 0
    share: float = 0.15
    block: int | None = None
    stride: int | None = None
    min_tokens: int = 20
    max_length: int = 128

    def of(self, kind: str, positions: int) -> dict[str, Any]:
        """Return the settings of a measure, with None replaced by its default.

        Args:
            kind: "masked", "causal" or "pseudo".
            positions: tokens that the model takes.
        """
        if kind == "causal":
            block = min(self.block or 1024, positions)
            return {"block": block, "stride": self.stride or max(1, block // 2)}
        of_lines = {"block": min(self.block or 512, positions), "min_tokens": self.min_tokens}
        return of_lines if kind == "pseudo" else {"seed": self.seed, "share": self.share, **of_lines}
