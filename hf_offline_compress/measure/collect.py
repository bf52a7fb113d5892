"""Plan + model + text → all statistics that the plan's groups need."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..architectures.families import objective_of
from ..architectures.layout import Matrix
from ..base.checkpoint import clamp_length
from ..errors import CompressionError, listing
from ..foundation.memory import release_memory
from ..foundation.processes import ALONE, Processes
from ..foundation.progress import bar as progress_bar
from ..plan.groups import Plan
from ..request.effort import EFFORTS
from ..runtime.architectures_compressed import token_limit
from .divergence import Divergence, Replaced
from .importance import measure_importance
from .in_order import Course
from .inputs import collect
from .passes import Passes
from .sensitivity import measure_sensitivity
from .statistics import Statistics
from .texts import Batch, CalibrationRecord, CalibrationText, batches_apart, count_tokens, make_batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# With fewer tokens a divergence is more noise than anything else.
LEAST_JUDGED = 512
# Windows that are run at once: few, so that half of the batches are half of the text.
JUDGED_AT_ONCE = 4


def measure(
    model: PreTrainedModel,
    plan: Plan,
    texts: CalibrationText,
    tokenizer: Any,
    *,
    seed: int,
    batch_size: int | None,
    progress: bool,
    processes: Processes = ALONE,
    passes: Passes | None = None,
) -> tuple[Statistics, CalibrationRecord]:
    """Return the statistics that the plan's objectives ask for, and what of the text is written down.

    Args:
        model: stock model in evaluation mode.
        plan: what is to become of it.
        texts: to run it on.
        tokenizer: the model's.
        seed: of the choice of texts, of masked places and of drawn directions.
        batch_size: texts in one forward pass.
        progress: show progress bars.
        processes: that share the work; all get all of its results.
        passes: how the model is run; through all of it at once by default. Importances know no other way.

    Raises:
        CompressionError: the text is mostly unknown tokens, or the output does not depend on what is asked about.
    """
    passes = passes or Passes(model)

    def bar(title: str) -> Callable[[Iterable[Any]], Iterable[Any]]:
        return lambda items: progress_bar(items, title, passes.unit, progress)

    options = _text_options(model, plan, tokenizer, seed, batch_size)
    batches, record = make_batches(texts, tokenizer, **options)
    mask_token = mask_token_of(plan, tokenizer)
    statistics = Statistics()
    wanted = [m for group in plan.groups if group.rule.objective.calibrated for m in group.matrices]
    if wanted:
        statistics = collect(
            model,
            wanted,
            batches,
            tied=plan.layout.tied and plan.recipe.sensitive,
            processes=processes,
            passes=passes,
            progress=bar("calibrating"),
        )
        for embedding in (m for m in wanted if m.kind == "word_embeddings"):
            asked_of = {name: options[name] for name in ("masked", "positions")}
            counts = count_tokens(texts, tokenizer, rows=embedding.rows, **asked_of)
            statistics.token_counts, statistics.place_counts = counts.tokens, counts.places
            statistics.positions = token_limit(model.config.to_dict())
            record = replace(record, counted=round(float(counts.tokens.sum())))
    release_memory()
    if plan.recipe.sensitive:
        asked = [m for group in plan.groups if group.rule.objective.sensitive for m in group.matrices]
        words = [m for m in plan.layout.matrices if m.kind == "word_embeddings"]
        statistics.word_embeddings = plan.layout.word_embeddings
        # Positions are added to words: what is said of an error in one holds for the other.
        measured = [m for m in asked if not m.embedding] + (words if any(m.embedding for m in asked) else [])
        mixed = {m.name for g in plan.groups if any(s.mixes_outputs for s in g.rule.structures) for m in g.matrices}
        squares = {m.name for m in measured if not m.embedding and m.name not in mixed}
        # Inputs that something merely calibrated shares are not weighed: it asks for what the layer sees.
        plain = {m.inputs for m in wanted if m not in asked}
        statistics.sensitivity = found = measure_sensitivity(
            model,
            measured,
            batches,
            mask_token=mask_token,
            seed=seed,
            squares=squares,
            input_moments=statistics.input_moments,
            plain=plain,
            processes=processes,
            passes=passes,
            progress=bar("sensitivity"),
        )
        if silent := [m.name for m in measured if m.name not in {*found.output_moments, *found.output_squares}]:
            raise CompressionError(
                f"The output of {plan.architecture} on plain text does not depend on {listing(silent[:3])}, so the objective "
                "'sensitive' is undefined for it; leave it out of `modules`, or use another objective for it."
            )
    important: dict[tuple[str, bool], list[Matrix]] = {}
    for group in plan.groups:
        objective = group.rule.objective
        if objective.importance != "none":
            important.setdefault((objective.importance, objective.parameter_wise), []).extend(group.matrices)
    truth = None
    if mask_token is not None and important:
        truth = [batch.input_ids for batch in make_batches(texts, tokenizer, **options | {"masked": False})[0]]
    for (kind, parameter_wise), matrices in important.items():
        statistics.importance[kind, parameter_wise] = measure_importance(
            model,
            matrices,
            batches,
            kind=kind,
            parameter_wise=parameter_wise,
            mask_token=mask_token,
            labels=truth,
            processes=processes,
            progress=bar("importance"),
        )
    return statistics, record


def divergence_from(
    model: PreTrainedModel,
    plan: Plan,
    texts: CalibrationText | None,
    tokenizer: Any,
    *,
    seed: int,
    batch_size: int | None,
) -> Divergence | None:
    """Return the dense model on text that `measure`, called with the same, does not see.

    None where there is hardly any such text, or nothing is to be allocated by what is measured.

    Args: see `measure`.
    """
    if texts is None or plan.recipe.allocation != "by_gain" or not EFFORTS[plan.recipe.effort].rounds:
        return None
    batch_size = min(batch_size or JUDGED_AT_ONCE, JUDGED_AT_ONCE)
    batches = batches_apart(texts, tokenizer, **_text_options(model, plan, tokenizer, seed, batch_size))
    if sum(int(batch.attention_mask.sum()) for batch in batches) < LEAST_JUDGED:
        return None
    matrices = [matrix for group in plan.groups for matrix in group.matrices]
    mask_token = mask_token_of(plan, tokenizer)
    return Divergence(model, matrices, batches, prefix=plan.layout.prefix, mask_token=mask_token)


def course_of(
    model: PreTrainedModel,
    plan: Plan,
    texts: CalibrationText | None,
    tokenizer: Any,
    embeddings: Replaced,
    *,
    seed: int,
    batch_size: int | None,
    processes: Processes = ALONE,
) -> Course:
    """Return text as `measure`, called with the same, sees it, before the first layer of the dense and the compressed model.

    Args: see `measure` and `Course`.
    """
    assert texts is not None
    options = _text_options(model, plan, tokenizer, seed, batch_size)
    used = EFFORTS[plan.recipe.effort].in_order  # of the same draw: none of what is judged by
    batches, _ = make_batches(texts, tokenizer, used=used, **options)
    return Course(model, plan.layout.matrices, batches, embeddings, prefix=plan.layout.prefix, processes=processes)


def batches_in_the_end(
    model: PreTrainedModel,
    plan: Plan,
    texts: CalibrationText | None,
    tokenizer: Any,
    tokens: int,
    *,
    seed: int,
    batch_size: int | None,
) -> list[Batch]:
    """Return about so many tokens of text for what is fitted last; if there is enough text, nothing else was fitted to them.

    Args: see `measure`.
    """
    assert texts is not None
    options = _text_options(model, plan, tokenizer, seed, batch_size)
    return make_batches(texts, tokenizer, used=tokens, from_end=True, **options)[0]


def mask_token_of(plan: Plan, tokenizer: Any) -> int | None:
    """Return the token at whose places a masked language model predicts; None for any other model."""
    return tokenizer.mask_token_id if _is_masked(plan) else None


def _is_masked(plan: Plan) -> bool:
    return objective_of(plan.architecture) == "masked"


def _text_options(
    model: PreTrainedModel, plan: Plan, tokenizer: Any, seed: int, batch_size: int | None
) -> dict[str, Any]:
    """Return which text is run, and how."""
    effort = EFFORTS[plan.recipe.effort]
    return {
        "masked": _is_masked(plan),
        "positions": clamp_length(tokenizer, model.config.to_dict()).model_max_length,
        "seed": seed,
        "batch_size": batch_size,
        "vocabulary": model.config.vocab_size,
        "wanted": effort.tokens,
        "apart": effort.judged if plan.recipe.allocation == "by_gain" else 0,
    }
