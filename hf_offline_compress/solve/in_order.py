"""Groups coded again in the order of the data, for the inputs that compressed layers before them really give.

Each group was solved as if it were the only one. Here a layer sees what the compressed layers before it make of the text, and
its matrices are fitted to what the dense model has at the same place: with x' for x, and r' for the r that the output W x is
added to, the best matrix in least squares is W + E[(W (x - x') + r - r') x'ᵀ] E[x' x'ᵀ]⁻¹ (GPTAQ: Li et al., ICML 2025, has the
first part). That is coded, with errors weighted as they were before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..artifact.building import weights_among
from ..artifact.report import GroupReport
from ..foundation.progress import bar as progress_bar
from ..measure.divergence import Replaced
from ..measure.in_order import Change, Course
from ..measure.statistics import Statistics
from ..plan.groups import Group, Plan

# A correction is fitted to few tokens. So only this share of it is believed, and the moments that it is solved with have as
# many tokens more that are all noise, of their mean variance. Both were chosen on validation text; all of it without loses.
BELIEVED, NOISE_TOKENS = 0.5, 1_600
# Kinds that are applied to relative positions, of which there may be as many as tokens in a portion.
RELATIVE = ("position_query", "position_key")

Solve = Callable[[Plan, Mapping[str, Tensor], Statistics], tuple[dict[str, Tensor], list[GroupReport], dict[str, str]]]


def solve_in_order(
    plan: Plan,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    statistics: Statistics,
    course: Callable[[Replaced], Course],
    solve: Solve,
    progress: bool,
) -> tuple[dict[str, Tensor], dict[str, GroupReport]]:
    """Return the tensors of all groups, those of layers solved again at the same sizes, and reports of these.

    Args:
        plan: with sizes.
        tensors: that stand for its groups, by full name.
        state: the base's tensors.
        statistics: of calibration; moments of inputs stay.
        course: matrices outside of layers, and what stands for them → the text, before the first layer.
        solve: solves groups of a plan for other weights and moments.
        progress: show a progress bar.
    """
    prefix = plan.layout.prefix
    found, reports = dict(tensors), dict[str, GroupReport]()
    again = [group for group in plan.groups if _may_be_solved_again(group)]
    if not again:
        return found, reports
    everything = weights_among(plan.groups, found, prefix)
    text = course([(m, weight) for m, weight in everything if m.layer is None and m.in_base])
    with progress_bar(None, "coding in order", "group", progress, total=len(again)) as bar:
        for index in range(text.depth):
            here = [group for group in again if group.matrices[0].layer == index]
            before = [(m, weight) for m, weight in everything if m.layer == index]
            with text.through(index, before, [group.matrices[0] for group in here]) as (places, put):
                for place in places:
                    own = [group for group in here if group.matrices[0].inputs == place.inputs]
                    change = text.change(index, place)
                    if not change.finite:  # a narrow dtype may overflow behind compressed layers
                        return found, {}
                    moments = {place.inputs: statistics.input_moments[place.inputs]}
                    known = replace(statistics, input_moments=moments)
                    some = replace(plan, groups=tuple(own))
                    solved, new, wider = solve(some, _targets(own, state, prefix, change), known)
                    if not wider:  # else they stay as they are
                        found |= solved
                        reports |= {report.name: report for report in new}
                        put(weights_among(own, found, prefix))
                    bar.update(len(own))
    return found, reports


def _may_be_solved_again(group: Group) -> bool:
    """Whether a group is one matrix of a layer, applied to tokens, of a structure that is solved without training."""
    matrix = group.matrices[0]
    in_layer = matrix.layer is not None and matrix.in_base and not matrix.embedding
    of_tokens = in_layer and matrix.kind not in RELATIVE
    return len(group.matrices) == 1 and of_tokens and group.structure.known_gains and group.rule.objective.calibrated


def _targets(groups: list[Group], state: Mapping[str, Tensor], prefix: str, change: Change) -> dict[str, Tensor]:
    """Return the weights that groups of one matrix would best have, by full name."""
    moments = change.moments.double()
    moments.diagonal().add_(NOISE_TOKENS / max(1, change.tokens) * moments.diagonal().mean().clamp_min(1e-30))
    root = torch.linalg.cholesky(moments)
    found: dict[str, Tensor] = {}
    for matrix in (group.matrices[0] for group in groups):
        name = f"{matrix.full_module(prefix)}.weight"
        found.setdefault(name, state[name].clone())
        into = matrix.dense(found, prefix)
        if change.outputs is not None:
            lacking = change.outputs[matrix.start : matrix.start + matrix.rows].double()
        else:
            assert change.inputs is not None
            lacking = into.double() @ change.inputs.double()
        into += BELIEVED * torch.cholesky_solve(lacking.T, root).T
    return found
