"""Allocation by measured loss: allocate, solve, measure each group separately, and allocate again.

A forecast to second order is wrong by a factor that differs from group to group: large errors cost more than it says, small
ones less, and neighbouring tokens are not independent. So each group is put into the dense model as it was coded, in deep
models with its neighbours, and its forecast is multiplied by the root of what it is off by, which damps the noise of few
tokens. Losses do not quite add up either: which allocation is kept is decided by the divergence of everything together.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite, isnan

from torch import Tensor

from ..architectures.layout import Matrix
from ..artifact.building import weights_among
from ..artifact.report import GroupReport
from ..foundation.processes import ALONE, Processes
from ..measure.divergence import Divergence
from ..plan.groups import Group, Plan
from ..request.effort import EFFORTS, Effort
from .apply import Offers
from .neighbours import neighbours

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
# A plan and its groups' tensors → those tensors with layers coded again, and reports of these by name.
InOrder = Callable[[Plan, dict[str, Tensor]], tuple[dict[str, Tensor], dict[str, GroupReport]]]
# A plan and the weights that stand for its matrices → parameters that are fitted to these, by full name.
Fit = Callable[[Plan, Sequence[tuple[Matrix, Tensor]]], dict[str, Tensor]]


@dataclass(frozen=True)
class Round:
    """One allocation.

    Attributes:
        forecast: sum of what was expected of the groups, in the unit of the divergence.
        measured: divergence of all groups together.
        in_order: the same once layers were coded again in the order of the data; None where they were not.
        last_norm: the same once the norm before the head was fitted as well; None where it was not.
    """

    forecast: float
    measured: float
    in_order: float | None = None
    last_norm: float | None = None


@dataclass(frozen=True)
class _Tried:
    """A group as it was solved at one size, and what that was expected and measured to cost."""

    group: Group
    tensors: dict[str, Tensor]
    report: GroupReport

    def weights(self, prefix: str) -> list[tuple[Matrix, Tensor]]:
        """Return each member and the weight [rows, columns] that stands for it."""
        return weights_among([self.group], self.tensors, prefix)


def allocated_and_solved(
    plan: Plan,
    offers: Offers | None,
    divergence: Divergence | None,
    solve: Callable[[Plan], Outcome],
    in_order: InOrder,
    last_norm: Fit | None = None,
    processes: Processes = ALONE,
) -> tuple[Plan, Outcome, list[Round]]:
    """Return the plan with sizes, all of its groups solved, and the rounds that it took.

    Args:
        plan: with sizes, where nothing is to be allocated.
        offers: what its groups may become; None where nothing is to be allocated.
        divergence: the dense model, where what is expected is to be checked.
        solve: solves the groups of a plan.
        in_order: codes layers again in the order of the data, where the effort asks for it.
        last_norm: fits the norm before the head, likewise; None where there is no such thing.
        processes: that share what is measured of groups.
    """
    if offers and divergence:
        effort = EFFORTS[plan.recipe.effort]
        sized, outcome, rounds = _by_measure(offers, divergence, solve, effort, processes)
        if effort.in_order and not outcome[2]:
            outcome, rounds = _in_order(sized, outcome, rounds, divergence, in_order, processes)
            if last_norm is not None:
                outcome, rounds = _last_norm(sized, outcome, rounds, divergence, last_norm, processes)
        return sized, outcome, rounds
    sized = offers.sized() if offers else plan
    return sized, solve(sized), []


def _by_measure(
    offers: Offers,
    divergence: Divergence,
    solve: Callable[[Plan], Outcome],
    effort: Effort,
    processes: Processes = ALONE,
) -> tuple[Plan, Outcome, list[Round]]:
    """Return the plan whose groups together were measured to lose least, its groups solved, and all rounds.

    What is solved once is not solved again. Groups whose storage does not hold them end it, with nothing else solved.

    Args:
        offers: what groups may become.
        divergence: the dense model, to measure against.
        solve: solves the groups of a plan.
        effort: how many allocations by what was measured, at most, and what measuring may cost; it ends as soon as one is no
            better than the one before.
        processes: that share what is measured of groups, and go on with what the first one measures of all together.
    """
    prefix = offers.plan.layout.prefix
    factors: dict[str, float] = {}
    least: dict[str, int] = {}
    known: dict[Group, _Tried] = {}
    best: tuple[Plan, list[_Tried]] | None = None
    history: list[Round] = []
    for left in range(effort.rounds, -1, -1):
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
            report = replace(report, forecast=divergence.of_curvature * offers.forecast(group))
            known[group] = _Tried(group, {name: tensors[name] for name in names}, report)
        found = [known[group] for group in plan.groups]
        measured = processes.gather(divergence.of([pair for tried in found for pair in tried.weights(prefix)]))[0]
        history.append(Round(sum(tried.report.forecast or 0.0 for tried in found), measured))
        logger.info("allocated by measure: forecast %.4g, measured %.4g", history[-1].forecast, measured)
        if best is not None and _lost(history[-1]) >= min(map(_lost, history[:-1])):
            break
        if left:  # after the last allocation, what groups cost by themselves would change nothing any more
            unknown = [tried for tried in found if tried.report.measured is None]
            allowed = effort.checking * sum(group.parameters for group in plan.groups)
            known |= {
                tried.group: tried for tried in _measured(unknown, divergence, prefix, factors, allowed, processes)
            }
            found = [known[group] for group in plan.groups]
            for tried in found:
                _learn(tried, factors, least)
        best = plan, found
    assert best is not None
    plan, found = best
    together = {name: tensor for tried in found for name, tensor in tried.tensors.items()}
    return plan, (together, [_last_measured(tried, known.values()) for tried in found], {}), history


def _in_order(
    plan: Plan,
    outcome: Outcome,
    rounds: list[Round],
    divergence: Divergence,
    in_order: InOrder,
    processes: Processes = ALONE,
) -> tuple[Outcome, list[Round]]:
    """Return what becomes of all groups with layers coded again, if that was measured to lose less; and the rounds."""
    tensors, reports, _ = outcome
    again, new = in_order(plan, tensors)
    if not new:
        return outcome, rounds
    weights = weights_among(plan.groups, again, plan.layout.prefix)
    measured = processes.gather(divergence.of(weights))[0]  # all processes go on with the same
    kept, told = _compared(rounds, "in_order", measured)
    if not kept:
        return outcome, told
    # What groups cost by themselves was measured before.
    found = [
        replace(
            new[old.name], forecast=old.forecast, measured=old.measured, seconds=old.seconds + new[old.name].seconds
        )
        if old.name in new
        else old
        for old in reports
    ]
    return (again, found, {}), told


def _last_norm(
    plan: Plan,
    outcome: Outcome,
    rounds: list[Round],
    divergence: Divergence,
    last_norm: Fit,
    processes: Processes = ALONE,
) -> tuple[Outcome, list[Round]]:
    """Return what becomes of all groups with the norm before the head fitted, if that was measured to lose less; and rounds."""
    tensors, reports, _ = outcome
    weights = weights_among(plan.groups, tensors, plan.layout.prefix) if processes.is_main else []
    fitted = processes.gather(last_norm(plan, weights) if processes.is_main else {})[0]
    if not fitted:
        return outcome, rounds
    measured = processes.gather(divergence.of(weights, others=fitted) if processes.is_main else 0.0)[0]
    kept, told = _compared(rounds, "last_norm", measured)
    return ((tensors | fitted, reports, {}) if kept else outcome), told


def _compared(rounds: list[Round], step: str, measured: float) -> tuple[bool, list[Round]]:
    """Return whether a step behind the best round was measured to lose less than all before; and the rounds, which tell so."""
    if not isfinite(measured):  # narrow dtypes may overflow, and JSON has no such numbers
        return False, rounds
    best = min(rounds, key=_lost)
    logger.info("%s: measured %.4g, before %.4g", step, measured, _lost(best))
    return measured < _lost(best), [replace(each, **{step: measured}) if each is best else each for each in rounds]


def _lost(step: Round) -> float:
    """Return the least divergence of all groups together; infinite where it is NaN, as narrow dtypes may overflow."""
    known = [value for value in (step.measured, step.in_order) if value is not None and not isnan(value)]
    return min(known, default=inf)


def _measured(
    unknown: Sequence[_Tried],
    divergence: Divergence,
    prefix: str,
    factors: Mapping[str, float],
    allowed: float,
    processes: Processes,
) -> Iterator[_Tried]:
    """Measure groups; those that are measured together share what they cost by what was expected of each."""
    by_group = {tried.group: tried for tried in unknown}

    def work(groups: Sequence[Group]) -> float:
        return divergence.work([matrix for group in groups for matrix in group.matrices], EVERY)

    def cost(groups: Sequence[Group]) -> float:
        return divergence.of([pair for group in groups for pair in by_group[group].weights(prefix)], EVERY)

    together = neighbours(list(by_group), work, allowed)
    costs = processes.map(cost, together, "group", works=[work(groups) for groups in together])
    for groups, measured in zip(together, costs, strict=True):
        some = [by_group[group] for group in groups]
        expected = [factors.get(tried.group.name, 1.0) * (tried.report.forecast or 0.0) + NOTHING for tried in some]
        for tried, own in zip(some, expected, strict=True):
            yield replace(tried, report=replace(tried.report, measured=measured * own / sum(expected)))


def _last_measured(tried: _Tried, known: Iterable[_Tried]) -> GroupReport:
    """Return a group's report, with forecast and loss at the last size at which they were compared."""
    if tried.report.measured is not None:
        return tried.report
    before = [
        other.report for other in known if other.group.name == tried.group.name and other.report.measured is not None
    ]
    checked = before[-1] if before else tried.report
    return replace(tried.report, forecast=checked.forecast, measured=checked.measured)


def _learn(tried: _Tried, factors: dict[str, float], least: dict[str, int]) -> None:
    """Correct a group's forecast by what was measured; if zeros would have been closer, ask for more bytes."""
    group, report = tried.group, tried.report
    believed = factors.get(group.name, 1.0)
    expected, measured = believed * (report.forecast or 0.0), report.measured or 0.0
    if expected > NOTHING and measured > NOTHING:
        factors[group.name] = believed * (measured / expected) ** BELIEVED
    if max(report.relative_error, report.calibrated_error or 0.0) > 1:
        least[group.name] = max(least.get(group.name, 0), group.stored_bytes)
