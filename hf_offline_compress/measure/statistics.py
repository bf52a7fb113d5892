"""Statistics of calibration text, and sums of outer products."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, field

from torch import Tensor

# Suffixes of heads that choose between several texts.
CHOICES = "ForMultipleChoice"


@dataclass
class Sensitivity:
    """Second moments of gradients.

    Attributes:
        output_moments: name of a matrix → E[g gᵀ] of the gradients at its outputs, float32: [rows, rows], or for an
            embedding [columns, columns].
        output_squares: name of a matrix of which only this was asked → E[g²] [rows], the diagonal of the same.
        head_share: how much of the loss's curvature lies at the logits: E[Σ g²] over tokens. 0 where there are none.
    """

    output_moments: MutableMapping[str, Tensor] = field(default_factory=dict)
    output_squares: MutableMapping[str, Tensor] = field(default_factory=dict)
    head_share: float = 0.0

    def squares(self, name: str) -> Tensor:
        """Return E[g²] of the gradients at a matrix's outputs, [rows]."""
        if name in self.output_squares:
            return self.output_squares[name]
        return self.output_moments[name].diagonal().clamp_min(0)


@dataclass
class Statistics:
    """What calibration measured.

    Attributes:
        input_moments: name of the inputs (`Matrix.inputs`) → E[x xᵀ] [columns, columns], float32.
        token_counts: how often each token was looked up, [tokens], float64.
        place_counts: how many texts reach each position, [tokens of the longest], float64.
        positions: how many positions the model has; None if its config does not say.
        sensitivity: what errors at outputs do to the model; measured only if asked for.
        word_embeddings: name of the matrix whose sensitivity is that of every embedding.
        importance: what is asked for (`Objective.importance`, `.parameter_wise`) → name of a matrix → importance of its
            rows [rows], or of its parameters [rows, columns].
    """

    input_moments: MutableMapping[str, Tensor] = field(default_factory=dict)
    token_counts: Tensor | None = None
    place_counts: Tensor | None = None
    positions: int | None = None
    sensitivity: Sensitivity | None = None
    word_embeddings: str | None = None
    importance: dict[tuple[str, bool], dict[str, Tensor]] = field(default_factory=dict)


def add_gram_(total: Tensor, x: Tensor, blocks: int = 4) -> None:
    """Add xᵀx to `total` [columns, columns], of which only blocks on and above the diagonal are computed.

    The lower ones are mirrored, which for 4 blocks saves 6 of 16 products.
    """
    edges = [round(i * x.shape[1] / blocks) for i in range(blocks + 1)]
    for i in range(blocks):
        left = slice(edges[i], edges[i + 1])
        right = slice(edges[i], edges[-1])
        product = x[:, left].T @ x[:, right]
        total[left, right] += product
        below = slice(edges[i + 1], edges[-1])
        total[below, left] += product[:, edges[i + 1] - edges[i] :].T
