"""The smallest model within an allowed loss: a search over budgets, judged on text held out from calibration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from ..architectures.families import is_language_model, objective_of
from ..errors import CompressionError
from ..measure.texts import CalibrationText
from ..plan.groups import FLOAT32, Plan
from ..request.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..artifact.report import GroupReport

Solved = tuple[Plan, "PreTrainedModel", list["GroupReport"]]

# Every n-th calibration text is held out if no validation text is given.
HELD_OUT = 8
# Texts that a model is judged on, at most.
JUDGED = 256
BLOCK = 128
# Ratios closer than this count as equal; and the most ratios tried.
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
    """Return disjoint texts to calibrate on and to judge by.

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
    """Return a function of a model's loss against the base: relative rise of perplexity, or 1 - agreement without a head."""
    chosen = list(texts.texts[:JUDGED])
    if is_language_model(type(base).__name__):
        from ..metrics.perplexity import perplexity

        def measured(model: Any) -> float:
            masked = objective_of(type(base).__name__) == "masked"
            options = {"block": BLOCK, "min_tokens": 8} if masked else {"block": BLOCK}
            return perplexity(model, tokenizer, chosen, **options).perplexity

        reference = measured(base)
        return lambda model: measured(model) / reference - 1
    from ..metrics.agreement import agreement, sentence_embeddings

    embeddings = sentence_embeddings(base, tokenizer, chosen)
    return lambda model: 1 - agreement(sentence_embeddings(model, tokenizer, chosen), embeddings)


def largest_ratio(
    attempt: Callable[[float], Trial], bounds: tuple[float, float], max_loss: float, start: float
) -> tuple[float, list[Trial]]:
    """Return the largest total ratio whose loss is at most `max_loss`, and all trials; by bisection of its logarithm.

    Args:
        attempt: tries a total ratio.
        bounds: the smallest and the largest possible ratio.
        max_loss: that is allowed.
        start: where to begin.

    Raises:
        CompressionError: the loss is larger even at the smallest ratio.
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
            "Allow more, or choose a recipe that keeps more bits."
        )
    return best, trials


def searched_on(
    max_loss: float,
    recipe: Recipe,
    texts: CalibrationText | None,
    validation: CalibrationText | None,
    sizes: tuple[object, ...],
) -> tuple[CalibrationText | None, CalibrationText]:
    """Return the texts to calibrate on and those to judge a search by.

    Args:
        max_loss: that is allowed.
        recipe: what is asked for.
        texts: to calibrate on, if there are any.
        validation: to judge by, if there is any.
        sizes: that were asked for; there must be none.

    Raises:
        CompressionError: no search is possible.
    """
    if not 0 < max_loss < 1:
        raise CompressionError(f"max_loss is {max_loss}; it must be above 0 and below 1, e.g. 0.01 for 1 %.")
    if any(size is not None for size in sizes):
        raise CompressionError("max_loss cannot be combined with a size: max_loss finds the size itself.")
    if recipe.budget is None:
        raise CompressionError(
            f"max_loss searches over budgets for all weights, and the recipe '{recipe.name}' has none; take balanced, "
            "small, tiny or nano, or give the recipe a budget."
        )
    if validation is not None:
        return texts, validation
    if texts is None:
        raise CompressionError("max_loss needs text to judge by: pass validation, or leave calibration on.")
    return hold_out(texts)


def search_ratio(
    solved: Callable[[Recipe], Solved],
    recipe: Recipe,
    plan: Plan,
    judge: Callable[[Any], float],
    max_loss: float,
    progress: bool,
) -> tuple[Solved, Recipe, list[Trial]]:
    """Return the solved model of the largest total ratio within the loss, its recipe, and all trials.

    Args:
        solved: makes a model by a recipe; returns its plan, itself, and the reports of its groups.
        recipe: with a budget, where the search begins.
        plan: of that recipe.
        judge: a model → its loss.
        max_loss: that is allowed.
        progress: print every trial.

    Raises:
        CompressionError: see `largest_ratio`.
    """
    total = plan.layout.total * FLOAT32
    ordered = {group.name: sorted(plan.forms(group), key=lambda form: form.stored_bytes) for group in plan.groups}
    largest = plan.reformed({name: forms[-1] for name, forms in ordered.items()})
    smallest = plan.reformed({name: forms[0] for name, forms in ordered.items()})
    kept: dict[float, Solved] = {}

    def with_ratio(ratio: float) -> Recipe:
        return recipe.override(total_ratio=round(ratio, 3))

    def attempt(ratio: float) -> Trial:
        found = solved(with_ratio(ratio))
        trial = Trial(round(ratio, 3), found[0].file_bytes, judge(found[1]))
        if trial.loss <= max_loss:
            kept.clear()  # the search only goes up from here
            kept[ratio] = found
        if progress:
            tqdm.write(f"total ratio {trial.total_ratio:g}: {trial.bytes:,} bytes, loss {trial.loss:.2%}")
        return trial

    assert recipe.budget is not None
    start = total / recipe.budget.allowed(plan.layout.total)
    bounds = (total / largest.file_bytes * 1.001, total / smallest.file_bytes * 0.999)
    best, trials = largest_ratio(attempt, bounds, max_loss, start)
    return kept[best], with_ratio(best), trials
