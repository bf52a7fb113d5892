"""Plan + model + statistics → what each group becomes: bytes go where they gain most."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from tqdm.auto import tqdm

from .allocation import Choices, allocate
from .calibration import Statistics
from .plan import FLOAT32, Group, Plan
from .recipe import STORAGES
from .solvers import expected_errors
from .weighting import problem_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# How often the budget is spent anew, and the share of it that is not worth that.
TRIES, NEARLY_NOTHING = 4, 0.002


def allocated(model: PreTrainedModel, plan: Plan, statistics: Statistics, progress: bool) -> Plan:
    """Return the plan with the bytes that its groups have in all given to those that gain most from them.

    Each group has one of its rule's structures, at one of its sizes; under a budget for everything, it may also stay dense.
    Groups whose errors are not known beforehand keep what they have.

    Args:
        model: the base.
        plan: with a budget in its recipe for everything, or with the sizes that the ratios of its rules give.
        statistics: of calibration.
        progress: show a progress bar.
    """
    groups = [group for group in plan.groups if group.structure.known_gains]
    allowed = plan.recipe.budget.allowed(plan.skeleton.total) if plan.recipe.budget else None
    # Where everything would fit as it is, there is nothing to weigh: what is asked for is a compressed model.
    may_stay = allowed is not None and plan.reformed(dict.fromkeys([g.name for g in groups])).file_bytes > allowed
    state, found = model.state_dict(), []
    for group in tqdm(groups, desc="allocating", unit="group", disable=not progress):
        found.append(_gains(group, plan, state, statistics, may_stay))
    if allowed is None:
        budget = sum(group.parameters * FLOAT32 / group.rule.ratio for group in groups)
    else:
        budget = allowed - (plan.file_bytes - sum(group.stored_bytes for group in groups))
    best: Plan | None = None
    tries = 0
    while best is None or tries < TRIES:
        chosen = allocate([gains.choices for gains in found], budget)
        forms = {group.name: gains.forms[i] for group, gains, i in zip(groups, found, chosen, strict=True)}
        sized = plan.reformed(forms)
        if allowed is None:
            return sized
        left = allowed - sized.file_bytes
        if left >= 0 and (best is None or sized.file_bytes > best.file_bytes):
            best = sized
        if 0 <= left < NEARLY_NOTHING * allowed:
            break
        # Other forms, another header of the file. What was within the budget may miss it by a little next time.
        budget += left if left < 0 else 0.9 * left
        tries += 1
    assert best is not None
    return best


@dataclass(frozen=True)
class _Gains:
    """What a group may become, None standing for dense, and what errors and bytes that means."""

    forms: list[Group | None]
    choices: Choices


def _gains(group: Group, plan: Plan, state: dict[str, torch.Tensor], statistics: Statistics, may_stay: bool) -> _Gains:
    dense = group.parameters * STORAGES[plan.rest]
    forms: list[Group | None] = []
    errors: list[float] = []
    for _, sizes in groupby(group.forms, key=lambda form: form.structure):
        smaller = [form for form in sizes if form.stored_bytes < dense]
        if not smaller:
            continue
        known = expected_errors(problem_of(smaller[0], state, plan.skeleton.prefix, statistics))
        finer = [replace(smaller[0], size=size) for size in known if not isinstance(size, int)]
        smaller += [form for form in finer if form.stored_bytes < dense]
        forms += smaller
        errors += [known[form.size] for form in smaller]
    costs = [float(form.stored_bytes) for form in forms if form]
    if may_stay:
        forms.append(None)
        errors.append(0.0)
        costs.append(float(dense))
    return _Gains(forms, Choices(torch.tensor(errors, dtype=torch.float64), torch.tensor(costs, dtype=torch.float64)))
