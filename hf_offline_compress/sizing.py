"""Plan + model + statistics → how large each group is: bytes go where they gain most."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from tqdm.auto import tqdm

from .allocation import Choices, allocate
from .calibration import Statistics
from .plan import FLOAT32, Plan
from .recipe import STORAGES
from .solvers import expected_errors
from .weighting import problem_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def allocated(model: PreTrainedModel, plan: Plan, statistics: Statistics, progress: bool) -> Plan:
    """Return the plan with the bytes that its groups have in all given to those that gain most from them.

    Groups whose errors are not known beforehand keep their sizes.

    Args:
        model: the base.
        plan: with a budget in its recipe for everything, or with the sizes that the ratios of its rules give.
        statistics: of calibration.
        progress: show a progress bar.
    """
    state = model.state_dict()
    choices = []
    groups = [group for group in plan.groups if group.structure.known_gains]
    for group in tqdm(groups, desc="allocating", unit="group", disable=not progress):
        problem = problem_of(group, state, plan.skeleton.prefix, statistics)
        candidates = range(group.structure.minimum, group.structure.limit(group.shape) + 1)
        costs = [float(replace(group, size=size).stored_bytes) for size in candidates]
        dense = group.parameters * STORAGES[plan.rest]
        costs = [cost for cost in costs if cost < dense]  # they grow with size: what is left is a beginning
        first = group.structure.minimum
        errors = expected_errors(problem).cpu()[first : first + len(costs)]
        choices.append(Choices(errors, torch.tensor(costs, dtype=torch.float64)))
    allowed = plan.recipe.budget.allowed(plan.skeleton.total) if plan.recipe.budget else None
    if allowed is None:
        budget = sum(group.parameters * FLOAT32 / group.rule.ratio for group in groups)
    else:
        budget = allowed - (plan.file_bytes - sum(group.stored_bytes for group in groups))
    while True:
        chosen = allocate(choices, budget)
        sizes = {group.name: i + group.structure.minimum for group, i in zip(groups, chosen, strict=True)}
        sized = plan.resized(sizes)
        if allowed is None or sized.file_bytes <= allowed:
            return sized
        budget -= sized.file_bytes - allowed  # other sizes, other numbers in the file's header
