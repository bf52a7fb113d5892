"""Plan + statistics → problems: how errors in each group are weighted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from ..measure.statistics import Statistics
from ..plan.groups import Group, Plan
from ..request.effort import EFFORTS
from ..solvers import Problem

# Additive smoothing of token counts, which weigh the rows of an embedding (Laplace's rule has 1): a token that the text lacks
# may still occur in use, less likely the more text there is.
TIMES_MORE = 3.0
# Rows that the text does not use weigh this share of the mean.
LEAST_IMPORTANCE, LEAST_SENSITIVITY = 0.01, 0.1
# Positions that no text of calibration reaches weigh this share of those that all do: longer texts must stay readable.
LEAST_OFTEN = 0.03


def problem_of(group: Group, state: Mapping[str, Any], plan: Plan, statistics: Statistics) -> Problem:
    """Return what is to be solved for a group of a plan: its matrices, and how errors in them are weighted."""
    weights = tuple(matrix.dense(state, plan.layout.prefix) for matrix in group.matrices)
    first, objective = group.matrices[0], group.rule.objective
    problem = Problem(
        group.structure,
        objective,
        group.size,
        weights,
        heads=first.heads,
        embedding=first.embedding,
        passes=EFFORTS[plan.recipe.effort].passes,
    )
    if objective.importance != "none":
        return _important(group, problem, statistics)
    if not objective.calibrated:
        return problem
    sensitivity = statistics.sensitivity
    if first.embedding:
        return _embedding_problem(group, problem, statistics)
    found = [statistics.input_moments[m.inputs] for m in group.matrices]
    pooled = torch.stack(found).mean(dim=0) if len(found) > 1 else found[0]
    problem = replace(problem, input_moments=pooled, member_moments=tuple(found))
    if not sensitivity or not objective.sensitive:
        return problem
    if group.structure.mixes_outputs:
        return replace(problem, output_moments=tuple(sensitivity.output_moments[m.name] for m in group.matrices))
    squares = torch.cat([sensitivity.squares(m.name) for m in group.matrices])
    return replace(problem, row_weights=squares + LEAST_SENSITIVITY * squares.mean())


def _important(group: Group, problem: Problem, statistics: Statistics) -> Problem:
    """Return the problem with squared errors weighted by squared importances, as FWSVD has it (ICLR 2022)."""
    objective = group.rule.objective
    measured = statistics.importance[objective.importance, objective.parameter_wise]
    found = [measured[matrix.name] for matrix in group.matrices]
    mean = torch.stack([weights.mean() for weights in found]).mean()
    squared = [weights.clamp_min(LEAST_IMPORTANCE * mean).square() for weights in found]
    if objective.parameter_wise:
        return replace(problem, parameter_weights=tuple(squared))
    return replace(problem, row_weights=torch.cat(squared))


def _embedding_problem(group: Group, problem: Problem, statistics: Statistics) -> Problem:
    """Return the problem of an embedding, whose rows count by how often they are looked up."""
    (matrix,) = group.matrices
    counts, sensitivity = statistics.token_counts, statistics.sensitivity
    moments = None
    if sensitivity and group.rule.objective.sensitive:
        moments = sensitivity.output_moments[str(statistics.word_embeddings)]
    if matrix.kind != "word_embeddings" or counts is None:
        if moments is None:  # nothing to weight positions by
            return replace(problem, objective=replace(problem.objective, calibrated=False, sensitive=False))
        return replace(problem, row_weights=_position_shares(matrix.rows, statistics), input_moments=moments)
    shares = (counts + TIMES_MORE) / (counts + TIMES_MORE).sum()
    if sensitivity and moments is not None and matrix.inputs in statistics.input_moments:
        # A tied head multiplies hidden states with the same rows: both uses count, in the same unit.
        moments = moments + sensitivity.head_share * statistics.input_moments[matrix.inputs]
    return replace(problem, row_weights=shares, input_moments=moments)


def _position_shares(rows: int, statistics: Statistics) -> torch.Tensor:
    """Return how much each row of position embeddings counts, [rows], 1 in all; all alike where nothing was counted."""
    counts = torch.ones(rows, dtype=torch.float64)
    if statistics.place_counts is not None:
        # The first rows are unused where positions are counted from behind a padding token, as in RoBERTa and OPT.
        first = max(0, rows - (statistics.positions or rows))
        places = statistics.place_counts[: rows - first]
        counts = torch.zeros_like(counts)
        counts[first : first + len(places)] = places
        counts += LEAST_OFTEN * counts.max()
    return (counts / counts.sum()).float()
