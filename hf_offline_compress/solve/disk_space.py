"""How much disk space a run takes beside its result: what it keeps to be resumed, and what does not stay in memory."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from ..architectures.layout import Matrix
from ..foundation.unfinished import place_of_unfinished
from ..measure.sensitivity import PART
from ..plan.groups import FLOAT32, Plan
from ..request.effort import EFFORTS


def bytes_beside(plan: Plan, target: Path | None, *, resume: bool, by_layers: bool) -> int:
    """Return about how many bytes of files a run still has to write, at most, beside its result.

    Args:
        plan: of what is to be done, before sizes are allocated.
        target: folder of the result, beside which a cut run may have left some of it.
        resume: whether what is measured and solved is kept.
        by_layers: whether the model is run layer by layer, which keeps statistics and hidden states in files.
    """
    needed = 0
    if resume or by_layers:
        needed += FLOAT32 * sum(_statistics(plan).values())
    if by_layers:
        needed += FLOAT32 * _meanwhile(plan)
    if resume:
        effort, again = EFFORTS[plan.recipe.effort], 0
        if plan.recipe.allocation == "by_gain":
            again = effort.rounds + bool(effort.in_order)
        needed += (1 + again) * plan.stored_bytes
        if target is not None:
            needed -= sum(file.stat().st_size for file in place_of_unfinished(target).glob("*"))
    return max(0, needed)


def _statistics(plan: Plan) -> Counter[int | None]:
    """Return how many numbers the statistics have, by the layers that they are of."""
    numbers: Counter[int | None] = Counter()
    for matrix in _inputs(plan):
        numbers[matrix.layer] += matrix.columns**2
    sensitive = [(group, m) for group in plan.groups if group.rule.objective.sensitive for m in group.matrices]
    if embeddings := [matrix.columns for _, matrix in sensitive if matrix.embedding]:
        numbers[None] += max(embeddings) ** 2
    for group, matrix in sensitive:
        if not matrix.embedding:
            mixed = any(structure.mixes_outputs for structure in group.rule.structures)
            numbers[matrix.layer] += matrix.rows**2 if mixed else matrix.rows
    for group in plan.groups:
        objective = group.rule.objective
        if objective.importance != "none":
            for matrix in group.matrices:
                numbers[matrix.layer] += matrix.rows * (matrix.columns if objective.parameter_wise else 1)
    return numbers


def _inputs(plan: Plan) -> list[Matrix]:
    """Return a matrix for each of the inputs whose moments are measured."""
    calibrated = [m for group in plan.groups if group.rule.objective.calibrated for m in group.matrices]
    of_head = plan.layout.tied and plan.recipe.sensitive
    measured = [m for m in calibrated if not m.embedding or (of_head and m.kind == "word_embeddings")]
    return list({matrix.inputs: matrix for matrix in measured}.values())


def _meanwhile(plan: Plan) -> int:
    """Return how many numbers there are for a while: hidden states, and sums whose new room is taken before the old is free."""
    if not plan.recipe.calibrated:
        return 0
    matrices = plan.layout.matrices
    layers = len({matrix.layer for matrix in matrices} - {None})
    width = max((matrix.columns for matrix in matrices if matrix.kind == "word_embeddings"), default=0)
    states = EFFORTS[plan.recipe.effort].tokens * width
    if not plan.recipe.sensitive:
        return 2 * states  # before and behind a layer
    # Between all layers, and gradients at two of these places.
    return max(2, (layers + 2) // PART + 1) * states + max(_statistics(plan).values(), default=0)
