"""Plan + model + statistics → what each group becomes: bytes go where they reduce the error most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import groupby

import torch

from ..foundation.processes import ALONE, Processes
from ..measure.statistics import Statistics
from ..plan.groups import FLOAT32, Group, Plan
from ..solve.problems import problem_of
from ..solvers import expected_errors
from ..structures import Size
from .allocation import Choices, allocate

# How often the budget is spent again at most, and the share left over at which that stops.
TRIES, NEARLY_NOTHING = 4, 0.002
# A form whose error counts as this many times the worst one is chosen only if nothing else fits.
STARVED = 1e3
# Products of a factorization that take as long as what is done with a number of a weight.
NUMBER = 500


@dataclass(frozen=True)
class Offers:
    """The choices of every group of a plan, and their costs.

    Attributes:
        plan: with a budget in its recipe for everything, or with the sizes that the ratios of its rules give.
        groups: those of its groups whose errors are known in advance; the others keep their sizes.
        gains: of each.
    """

    plan: Plan
    groups: list[Group]
    gains: list[_Gains]

    def forecast(self, form: Group) -> float:
        """Return the expected error of a form of a group, in the unit of the sensitivity."""
        index = next(i for i, group in enumerate(self.groups) if group.name == form.name)
        return float(self.gains[index].choices.errors[self.gains[index].forms.index(form)])

    def sized(self, factors: Mapping[str, float] | None = None, least: Mapping[str, int] | None = None) -> Plan:
        """Return the plan with its groups' total bytes distributed for the least total error.

        Each group has one of its rule's structures, at one of its sizes; under a budget for everything, it may also stay
        dense.

        Args:
            factors: name of a group → factor on its errors.
            least: name of a group → bytes that it must exceed, if it is compressed.
        """
        choices = []
        for group, gains in zip(self.groups, self.gains, strict=True):
            errors = gains.choices.errors * (factors or {}).get(group.name, 1.0)
            starved = gains.choices.costs <= (least or {}).get(group.name, 0)
            if not starved.all():
                errors = torch.where(starved, STARVED * errors.max().clamp_min(torch.finfo(errors.dtype).tiny), errors)
            choices.append(replace(gains.choices, errors=errors))
        allowed = _allowed(self.plan)
        if allowed is None:
            budget = sum(group.parameters * FLOAT32 / group.rule.ratio for group in self.groups)
        else:
            budget = allowed - (self.plan.file_bytes - sum(group.stored_bytes for group in self.groups))
        best: Plan | None = None
        tries = 0
        while best is None or tries < TRIES:
            chosen = allocate(choices, budget)
            forms = {group.name: own.forms[i] for group, own, i in zip(self.groups, self.gains, chosen, strict=True)}
            sized = self.plan.reformed(forms)
            if allowed is None:
                return sized
            left = allowed - sized.file_bytes
            if left >= 0 and (best is None or sized.file_bytes > best.file_bytes):
                best = sized
            if 0 <= left < NEARLY_NOTHING * allowed:
                break
            # Other forms change the header of the file, so a plan within the budget may miss it by a little the next time.
            budget += left if left < 0 else 0.9 * left
            tries += 1
        assert best is not None
        return best


def offers_of(
    state: Mapping[str, torch.Tensor],
    plan: Plan,
    statistics: Statistics,
    progress: bool,
    processes: Processes = ALONE,
) -> Offers:
    """Return the choices of a plan's groups, with errors predicted from the statistics.

    Args:
        state: the base's tensors.
        plan: see `Offers`.
        statistics: of calibration.
        progress: show a progress bar.
        processes: that share the groups.
    """
    groups = [group for group in plan.groups if group.structure.known_gains]
    allowed = _allowed(plan)
    # If everything would fit uncompressed there is nothing to allocate: a compressed model was asked for.
    may_stay = allowed is not None and plan.reformed(dict.fromkeys([g.name for g in groups])).file_bytes > allowed
    gains = processes.map(
        lambda group: _gains(group, plan, state, statistics, may_stay),
        groups,
        "group",
        works=[_expected_work(group) for group in groups],
        desc="allocating",
        progress=progress,
    )
    return Offers(plan, groups, gains)


def _expected_work(group: Group) -> float:
    """Return about how long it takes to find a group's errors, in a unit of its own.

    Its metric is factorized, and its numbers are gone through, each of which takes as long as many products.
    """
    metric = group.columns**3 if group.rule.objective.calibrated else 0
    return float(metric / 3 + NUMBER * group.parameters)


def _allowed(plan: Plan) -> int | None:
    """Return the bytes that the plan's budget allows, if it has one."""
    return plan.recipe.budget.allowed(plan.layout.total) if plan.recipe.budget else None


@dataclass(frozen=True)
class _Gains:
    """The choices of a group, None for dense, with their errors and bytes."""

    forms: list[Group | None]
    choices: Choices


def _gains(
    group: Group, plan: Plan, state: Mapping[str, torch.Tensor], statistics: Statistics, may_stay: bool
) -> _Gains:
    dense = plan.dense_bytes(group.matrices)
    forms: list[Group | None] = []
    errors: list[float] = []
    costs: list[float] = []

    def add(form: Group, known: Mapping[Size, float]) -> None:
        cost = form.stored_bytes
        if cost < dense:
            forms.append(form)
            errors.append(known[form.size])
            costs.append(float(cost))

    for _, of_structure in groupby(plan.forms(group), key=lambda form: form.structure):
        by_storage = {storage: list(sizes) for storage, sizes in groupby(of_structure, key=lambda form: form.storage)}
        some = [sizes[0] for sizes in by_storage.values()]
        if all(form.stored_bytes >= dense for form in some):  # these are the smallest
            continue
        problem = problem_of(some[0], state, plan, statistics)
        for sizes, known in zip(by_storage.values(), expected_errors(problem, list(by_storage)), strict=True):
            for form in sizes:
                add(form, known)
            for size in known:
                if not isinstance(size, int):  # finer than the plan's sizes
                    add(replace(sizes[0], size=size), known)
    if may_stay:
        forms.append(None)
        errors.append(0.0)
        costs.append(float(dense))
    return _Gains(forms, Choices(torch.tensor(errors, dtype=torch.float64), torch.tensor(costs, dtype=torch.float64)))
