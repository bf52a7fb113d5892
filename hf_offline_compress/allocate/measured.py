"""Allocation by measured loss: allocate, solve, measure each group separately, and allocate again.

A forecast to second order is wrong by a factor that differs from group to group: large errors cost more than it says, small
ones less, and neighbouring tokens are not independent. So each group is put into the dense model as it was coded, and its
forecast is multiplied by the root of what it is off by, which damps the noise of few tokens. Losses do not quite add up
either: which allocation is kept is decided by the divergence of everything together.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from ..architectures.layout import Matrix
from ..artifact.building import factors_among, reconstructed
from ..artifact.report import GroupReport
from ..measure.divergence import Divergence
from ..plan.groups import Group, Plan
from ..request.effort import EFFORTS
from .apply import Offers

logger = logging.getLogger(__name__)

# The share of a forecast's error, in logarithms, that is corrected.
BELIEVED = 0.5
# A single group is measured on one batch in this many, all groups together on all batches: errors of forecasts are much
# larger than the noise of few tokens, but rounds differ little.
EVERY = 2
# Below this divergence, what is measured is rounding error.
NOTHING = 1e-9
# What solving gives: tensors by full name, a report of each group, and groups whose storage does not hold them, with the
# dtypes that do.
Outcome = tuple[dict[str, Tensor], list[GroupReport], dict[str, str]]


@dataclass(frozen=True)
class Round:
    """One allocation.

    Attributes:
        forecast: sum of what was expected of the groups, in the unit of the divergence.
        measured: divergence of all groups together.
    """

    forecast: float
    measured: float


@dataclass(frozen=True)
class _Tried:
    """A group as it was solved at one size, and what that was expected and measured to cost."""

    group: Group
    tensors: dict[str, Tensor]
    report: GroupReport

    def weights(self, prefix: str) -> list[tuple[Matrix, Tensor]]:
        """Return each member and the weight [rows, columns] that stands for it."""
        factors = factors_among(self.group, self.tensors, prefix)
        return list(zip(self.group.matrices, reconstructed(self.group, factors), strict=True))


def allocated_and_solved(
    plan: Plan, offers: Offers | None, divergence: Divergence | None, solve: Callable[[Plan], Outcome]
) -> tuple[Plan, Outcome, list[Round]]:
    """Return the plan with sizes, all of its groups solved, and the rounds that it took.

    Args:
        plan: with sizes, where nothing is to be allocated.
        offers: what its groups may become; None where nothing is to be allocated.
        divergence: the dense model, where what is expected is to be checked.
        solve: solves the groups of a plan.
    """
    if offers and divergence:
        return _by_measure(offers, divergence, solve, EFFORTS[plan.recipe.effort].rounds)
    sized = offers.sized() if offers else plan
    return sized, solve(sized), []


def _by_measure(
    offers: Offers, divergence: Divergence, solve: Callable[[Plan], Outcome], rounds: int
) -> tuple[Plan, Outcome, list[Round]]:
    """Return the plan whose groups together were measured to lose least, its groups solved, and all rounds.

    What is solved once is not solved again. Groups whose storage does not hold them end it, with nothing else solved.

    Args:
        offers: what groups may become.
        divergence: the dense model, to measure against.
        solve: solves the groups of a plan.
        rounds: allocations by what was measured, at most; it ends as soon as one is no better than the one before.
    """
    prefix = offers.plan.layout.prefix
    factors: dict[str, float] = {}
    least: dict[str, int] = {}
    known: dict[Group, _Tried] = {}
    best: tuple[Plan, list[_Tried]] | None = None
    history: list[Round] = []
    for _ in range(rounds + 1):
        plan = offers.sized(factors, least)
        new = [group for group in plan.groups if group not in known]
        tensors, reports, wider = solve(replace(plan, groups=tuple(new)))
        if wider:
            return plan, ({}, [], wider), history
        for group, report in zip(new, reports, strict=True):
            names = [
                *group.decoder_tensors(prefix),
                *(n for m in group.matrices for n in group.member_tensors(m, prefix)),
            ]
            tried = _Tried(group, {name: tensors[name] for name in names}, report)
            forecast = divergence.of_curvature * offers.forecast(group)
            measured = divergence.of(tried.weights(prefix), EVERY)
            known[group] = replace(tried, report=replace(report, forecast=forecast, measured=measured))
        found = [known[group] for group in plan.groups]
        measured = divergence.of([pair for tried in found for pair in tried.weights(prefix)])
        history.append(Round(sum(tried.report.forecast or 0.0 for tried in found), measured))
        logger.info("allocated by measure: forecast %.4g, measured %.4g", history[-1].forecast, measured)
        if best is not None and measured >= min(step.measured for step in history[:-1]):
            break
        best = plan, found
        for tried in found:
            _learn(tried, factors, least)
    assert best is not None
    plan, found = best
    together = {name: tensor for tried in found for name, tensor in tried.tensors.items()}
    return plan, (together, [tried.report for tried in found], {}), history


def _learn(tried: _Tried, factors: dict[str, float], least: dict[str, int]) -> None:
    """Correct a group's forecast by what was measured; if zeros would have been closer, ask for more bytes."""
    group, report = tried.group, tried.report
    believed = factors.get(group.name, 1.0)
    expected, measured = believed * (report.forecast or 0.0), report.measured or 0.0
    if expected > NOTHING and measured > NOTHING:
        factors[group.name] = believed * (measured / expected) ** BELIEVED
    if max(report.relative_error, report.calibrated_error or 0.0) > 1:
        least[group.name] = max(least.get(group.name, 0), group.stored_bytes)
