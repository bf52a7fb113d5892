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
from ..foundation.progress import bar as progress_bar
from ..plan.groups import Plan
from .importance import measure_importance
from .inputs import collect
from .sensitivity import measure_sensitivity
from .statistics import Statistics
from .texts import CalibrationRecord, CalibrationText, count_tokens, make_batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def measure(
    model: PreTrainedModel,
    plan: Plan,
    texts: CalibrationText,
    tokenizer: Any,
    *,
    seed: int,
    batch_size: int | None,
    progress: bool,
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

    Raises:
        CompressionError: the text is mostly unknown tokens, or the output does not depend on what is asked about.
    """

    def bar(title: str) -> Callable[[Iterable[Any]], Iterable[Any]]:
        return lambda items: progress_bar(items, title, "batch", progress)

    masked = objective_of(plan.architecture) == "masked"
    positions = clamp_length(tokenizer, model.config.to_dict()).model_max_length
    options: dict[str, Any] = {
        "positions": positions,
        "seed": seed,
        "batch_size": batch_size,
        "vocabulary": model.config.vocab_size,
    }
    batches, record = make_batches(texts, tokenizer, masked=masked, **options)
    mask_token = tokenizer.mask_token_id if masked else None
    statistics = Statistics()
    wanted = [m for group in plan.groups if group.rule.objective.calibrated for m in group.matrices]
    if wanted:
        statistics = collect(
            model, wanted, batches, tied=plan.layout.tied and plan.recipe.sensitive, progress=bar("calibrating")
        )
        for embedding in (m for m in wanted if m.kind == "word_embeddings"):
            counts = count_tokens(texts, tokenizer, masked=masked, positions=positions, rows=embedding.rows)
            statistics.token_counts, record = counts, replace(record, counted=round(float(counts.sum())))
    release_memory()
    if plan.recipe.sensitive:
        asked = [m for group in plan.groups if group.rule.objective.sensitive for m in group.matrices]
        words = [m for m in plan.layout.matrices if m.kind == "word_embeddings"]
        statistics.word_embeddings = plan.layout.word_embeddings
        # Positions are added to words: what is said of an error in one holds for the other.
        measured = [m for m in asked if not m.embedding] + (words if any(m.embedding for m in asked) else [])
        mixed = {m.name for g in plan.groups if any(s.mixes_outputs for s in g.rule.structures) for m in g.matrices}
        squares = {m.name for m in measured if not m.embedding and m.name not in mixed}
        statistics.sensitivity = found = measure_sensitivity(
            model, measured, batches, mask_token=mask_token, seed=seed, squares=squares, progress=bar("sensitivity")
        )
        if silent := [m.name for m in measured if m.name not in found.output_moments | found.output_squares]:
            raise CompressionError(
                f"The output of {plan.architecture} on plain text does not depend on {listing(silent[:3])}, so the objective "
                "'sensitive' says nothing of it; leave it out of `modules`, or give it a rule with another objective."
            )
    important: dict[tuple[str, bool], list[Matrix]] = {}
    for group in plan.groups:
        objective = group.rule.objective
        if objective.importance != "none":
            important.setdefault((objective.importance, objective.parameter_wise), []).extend(group.matrices)
    truth = None
    if masked and important:
        truth = [batch.input_ids for batch in make_batches(texts, tokenizer, masked=False, **options)[0]]
    for (kind, parameter_wise), matrices in important.items():
        statistics.importance[kind, parameter_wise] = measure_importance(
            model,
            matrices,
            batches,
            kind=kind,
            parameter_wise=parameter_wise,
            mask_token=mask_token,
            labels=truth,
            progress=bar("importance"),
        )
    return statistics, record
