"""The smallest model within an allowed loss: a search over budgets, judged on text held out from calibration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .calibration_text import CalibrationText
from .errors import CompressionError
from .families import CAUSAL_HEADS, MASKED_HEADS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Of the calibration texts, each such one is held out where no validation text is given.
HELD_OUT = 8
# Texts that a model is judged on, at most.
JUDGED = 256
BLOCK = 128
# Ratios closer than this count as one, and no more than so many are tried.
PRECISION, TRIALS = 1.03, 8


@dataclass(frozen=True)
class Trial:
    """One size that was tried.

    Attributes:
        total_ratio: that was asked for.
        bytes: of the weight file, as planned.
        loss: relative rise of perplexity, or fall of agreement.
    """

    total_ratio: float
    bytes: int
    loss: float


def hold_out(texts: CalibrationText) -> tuple[CalibrationText, CalibrationText]:
    """Return the texts to calibrate on and those to judge by, none of which is both.

    Raises:
        CompressionError: there are too few.
    """
    if len(texts.texts) < 2 * HELD_OUT:
        raise CompressionError(
            f"max_loss holds out one calibration text in {HELD_OUT}, and there are only {len(texts.texts)}; give more, or "
            "pass validation text."
        )
    held = texts.texts[::HELD_OUT]
    kept = tuple(text for i, text in enumerate(texts.texts) if i % HELD_OUT)
    return replace(texts, texts=kept), CalibrationText(held, f"held out from {texts.source}")


def loss_judge(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: CalibrationText
) -> Callable[[Any], float]:
    """Return what gives a model's loss against the base: relative rise of perplexity, or 1 - agreement without a head."""
    chosen = list(texts.texts[:JUDGED])
    if type(base).__name__.endswith((*MASKED_HEADS, *CAUSAL_HEADS)):
        from .evaluate.perplexity import perplexity

        def measured(model: Any) -> float:
            options = (
                {"block": BLOCK, "min_tokens": 8} if type(base).__name__.endswith(MASKED_HEADS) else {"block": BLOCK}
            )
            return perplexity(model, tokenizer, chosen, **options).perplexity

        reference = measured(base)
        return lambda model: measured(model) / reference - 1
    from .evaluate.agreement import agreement, sentence_embeddings

    embeddings = sentence_embeddings(base, tokenizer, chosen)
    return lambda model: 1 - agreement(sentence_embeddings(model, tokenizer, chosen), embeddings)


def largest_ratio(
    attempt: Callable[[float], Trial], bounds: tuple[float, float], max_loss: float, start: float
) -> tuple[float, list[Trial]]:
    """Return the largest total ratio whose loss is at most `max_loss`, and all trials; by bisection of its logarithm.

    Args:
        attempt: tries a total ratio.
        bounds: the least and the largest ratio that there is.
        max_loss: that is allowed.
        start: where to begin.

    Raises:
        CompressionError: even the least ratio loses more.
    """
    low, high = bounds
    trials: list[Trial] = []
    best: float | None = None
    ratio = min(max(start, low), high)
    while len(trials) < TRIALS:
        trials.append(attempt(ratio))
        if trials[-1].loss <= max_loss:
            best = low = ratio
        else:
            high = ratio
        if best is None and ratio == low:
            break
        if high / low < PRECISION:
            if best is not None:
                return best, trials
            ratio = low
        else:
            ratio = (low * high) ** 0.5
    if best is None:
        least = min(trials, key=lambda trial: trial.total_ratio)
        raise CompressionError(
            f"A loss of at most {max_loss:.2%} was not reached: at total ratio {least.total_ratio:.2f} it is {least.loss:.2%}. "
            "Allow more, or take a recipe that keeps more bits."
        )
    return best, trials
