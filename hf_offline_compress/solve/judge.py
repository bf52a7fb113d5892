"""Held-out text that selects the training step: the model's perplexity with one group's weights replaced."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..architectures.families import is_language_model
from ..errors import CompressionError
from ..measure.divergence import exchanged
from ..measure.texts import CalibrationText
from ..metrics.perplexity import perplexity
from ..plan.groups import Group, Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# A judge is asked many times: so many texts are enough to tell one epoch from another.
TEXTS = 100
LENGTH = 128


def check_judged(architecture: str) -> None:
    """Raise CompressionError if a stock class is no language model."""
    if not is_language_model(architecture):
        raise CompressionError(
            f"Validation text selects by perplexity, and {architecture} is not a language model. Leave the "
            "validation text out, or choose a head with auto_class."
        )


def perplexity_judge(
    model: PreTrainedModel, plan: Plan, tokenizer: Any, texts: CalibrationText
) -> Callable[[Group], Callable[[Tensor], float]]:
    """Return group → (rows of all members → the model's perplexity with them, everything else as it is).

    Raises:
        CompressionError: the model is no language model.
    """
    check_judged(plan.architecture)
    lines = [line for text in texts.texts for line in text.splitlines() if len(line.split()) >= 20][:TEXTS]
    if not lines:
        raise CompressionError(f"The validation text '{texts.source}' has no line of 20 words or more.")

    def judge(group: Group) -> Callable[[Tensor], float]:
        def judged(rows: Tensor) -> float:
            replaced = list(zip(group.matrices, rows.split(group.shape.rows), strict=True))
            with exchanged(model, plan.layout.prefix, replaced):
                return perplexity(model, tokenizer, lines, block=LENGTH).perplexity

        return judged

    return judge
