"""Plan + statistics → factors of every group, rounded to their storage, and a report of each."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..artifact.building import named_tensors, reconstructed, rounded_factors
from ..artifact.report import GroupReport, group_report
from ..foundation.memory import release_memory
from ..foundation.processes import ALONE, Processes, shared_out
from ..foundation.progress import bar as progress_bar
from ..foundation.progress import note
from ..foundation.unfinished import UnfinishedRun
from ..measure.statistics import Statistics
from ..plan.groups import Group, Plan
from ..solvers import ANY_SIZES, BATCHED_SOLVERS, Factors, Problem, rounded_to_integers, solve_all
from ..solvers.trellis import is_searched_slowly
from ..structures import Trellis
from .precision import wider_storage
from .problems import problem_of
from .resuming import Solved, kept_solution
from .sharing import expected_work

# Numbers that the weights, or the metrics, of groups solved together may be: gradients, optimizer states and factorizations
# take several times as much.
WEIGHTS_AT_ONCE, METRICS_AT_ONCE = 2**23, 2**25


def tell_of_slow_search(plan: Plan, device: torch.device) -> None:
    """Say which library is missing where a plan has trellises, or may come to have some."""
    structures = (structure for group in plan.groups for structure in group.rule.structures)
    if any(isinstance(structure, Trellis) for structure in structures) and is_searched_slowly(device):
        note(
            "Numba is not installed: codes are found several times as slowly as with the extra 'fast' (see the README)"
        )


def solve_groups(
    plan: Plan,
    state: Mapping[str, Any],
    statistics: Statistics,
    *,
    seed: int,
    progress: bool,
    judge: Callable[[Group], Callable[[Tensor], float]] | None = None,
    run: UnfinishedRun | None = None,
    processes: Processes = ALONE,
) -> tuple[dict[str, Tensor], list[GroupReport], dict[str, str]]:
    """Return the tensors that stand for all groups, by full name and in storage dtype, and a report of each.

    Last come the names of groups whose storage does not hold their numbers, with the dtypes that do: what was solved is
    of no use then, and they must be planned again.

    Args:
        plan: what is to be solved.
        state: the base's tensors.
        statistics: of calibration; moments are dropped after their last use.
        seed: of everything random.
        progress: show a progress bar.
        judge: group → (rows → the model's loss with them); chooses among the steps of training.
        run: keeps what is solved, and knows what was solved before a cut; None keeps nothing.
        processes: that share the groups; all get all of them.

    Raises:
        CompressionError: what a solver gave is not finite, or not held by the model's own dtype.
    """
    # Embeddings, which need the most memory, come last: by then the moments of all layers have been dropped.
    order = sorted(enumerate(plan.groups), key=lambda item: item[1].matrices[0].embedding)
    batches = _batches(order)
    solvers = shared_out(
        [sum(expected_work(group) for _, group in batch) for batch in batches], [0.0] * processes.count
    )
    last_use = {m.inputs: number for number, batch in enumerate(batches) for _, group in batch for m in group.matrices}

    def solve_batch(batch: Sequence[tuple[int, Group]], step: Callable[[float], None]) -> Solved:
        problems = []
        for index, group in batch:
            problem = problem_of(group, state, plan, statistics)
            own = judge(group) if judge else None
            problems.append(replace(problem, seed=seed + index, progress=step, judge=own))
        groups = [group for _, group in batch]
        return kept_solution(run, groups, problems, lambda: _solved(plan, groups, problems))

    found: list[Solved] = []
    with progress_bar(None, "compressing", "group", progress, total=len(plan.groups)) as bar:
        for number, (batch, solver) in enumerate(zip(batches, solvers, strict=True)):

            def step(share: float, before: float = bar.n, count: int = len(batch)) -> None:
                bar.update(int(before + share * count + 1e-6) - bar.n)  # whole groups

            if solver == processes.index:
                found.append(solve_batch(batch, step))
            for name in {m.inputs for _, group in batch for m in group.matrices}:
                if last_use[name] == number:  # moments of wide layers are large
                    statistics.input_moments.pop(name, None)
            release_memory()  # free the memory of this batch; the next one has another shape
            step(1.0)
    found = [solved for each in processes.gather(found) for solved in each]
    tensors = {name: tensor for solved in found for name, tensor in solved.tensors.items()}
    reports = {report.name: report for solved in found for report in solved.reports}
    wider = {name: dtype for solved in found for name, dtype in solved.wider.items()}
    return tensors, [reports[group.name] for group in plan.groups], wider


def _solved(plan: Plan, groups: Sequence[Group], problems: Sequence[Problem]) -> Solved:
    """Return what becomes of groups that are solved together."""
    started = time.perf_counter()
    factors = solve_all(problems)
    seconds = (time.perf_counter() - started) / len(groups)
    tensors: dict[str, Tensor] = {}
    reports: list[GroupReport] = []
    wider: dict[str, str] = {}
    for group, problem, found in zip(groups, problems, factors, strict=True):

        def in_storage(form: Group, problem: Problem = problem, found: Factors = found) -> Factors:
            return rounded_to_integers(problem, found, form.storage) if form.storage.bits else found

        kept = in_storage(group)
        if dtype := wider_storage(group, plan.dtype, kept, in_storage):
            wider[group.name] = dtype
        stored = rounded_factors(group, kept, plan.dtype)
        tensors.update(named_tensors(group, stored, plan.layout.prefix))
        dense = list(reconstructed(group, stored))
        reports.append(group_report(group, problem, dense, seconds=seconds, notes=kept.notes))
    return Solved(tensors, tuple(reports), wider)


def _batches(order: list[tuple[int, Group]]) -> list[list[tuple[int, Group]]]:
    """Return the groups in batches of those that are best solved together."""
    batches: list[list[tuple[int, Group]]] = []
    found: dict[Any, list[tuple[int, Group]]] = {}
    for index, group in order:
        size = None if group.structure.name in ANY_SIZES else group.size
        key: Any = (group.structure, group.rule.objective, group.shape, size)
        batch = found.get(key)
        metric = group.columns**2 if group.rule.objective.calibrated else 0
        most = min(WEIGHTS_AT_ONCE // group.parameters, METRICS_AT_ONCE // max(1, metric))
        if group.structure.name not in BATCHED_SOLVERS or batch is None or len(batch) >= most:
            batch = found[key] = []
            batches.append(batch)
        batch.append((index, group))
    return batches
