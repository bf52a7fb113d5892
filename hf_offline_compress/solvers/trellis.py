"""Trellis codes: the best path through all states by dynamic programming, with error feedback between columns.

The streams of a matrix run down its rows, `width` columns at a time (see `Trellis`). Where errors are weighted by a
layer's inputs, a block of columns is coded only once all columns before it are, and absorbs their errors, as in GPTQ.
Within the block a row's error costs what it costs, however its neighbours were coded: so the best codes of a whole run of
rows are a shortest path through the states (Viterbi, 1967; Marcellin & Fischer, 1990), on which rows that matter more
get the nearer values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..runtime.packing_compressed import pack
from ..runtime.trellis_compressed import decode_scales, trellis_table
from ..structures import Trellis
from ..structures.trellis import DISTORTIONS, index_bits
from .base import Factors, Problem
from .feedback import BLOCK, DAMPING, inverse_roots, metric_of, row_importance, undetermined

# Numbers that path costs of one block of columns may be: so few that they stay in the cache, and small beside the model.
COSTS_AT_ONCE = 2**23
# In standard deviations of a row; values beyond are what outliers are looked for among.
OUTLYING = 3.0
TINY = 1e-12


@torch.no_grad()
def solve_trellises(problems: Sequence[Problem]) -> list[Factors]:
    """Return codes, scales and outliers for each problem; all are of one shape, size, objective and options."""
    task = _task(problems)
    outliers, places = _outliers(task, task.structure.outlier_count(problems[0].shape))
    rest = task.weights - outliers
    scales, _, _ = _rounded_scales(rest.square().mean(dim=2).sqrt())
    weights = task.importance * scales.square()
    states = _encode(rest / scales[..., None], weights / weights.mean().clamp_min(TINY), task)
    decoded = _decode(states, task)
    reached, wanted = task.shaped(decoded), task.shaped(rest)
    best = (reached * wanted).sum(dim=2) / reached.square().sum(dim=2).clamp_min(TINY)
    scales, codes, bounds = _rounded_scales(torch.where(best > 0, best, scales))
    lost = task.total(wanted - reached * scales[..., None])
    total = task.total(task.shaped(task.weights))
    packed = _packed(states, task)
    found = []
    for i, problem in enumerate(problems):
        tensors = {"codes": packed[i], "scales": codes[i], "scale_range": bounds[i]}
        if places is not None:
            tensors |= _packed_outliers(task.weights[i], places[i])
        found.append(
            Factors((tensors,), {}, {"error": float((lost[i] / total[i].clamp_min(TINY)).clamp_min(0).sqrt())})
        )
        problem.progress(1.0)
    return found


@torch.no_grad()
def trellis_errors(problem: Problem) -> Tensor:
    """Return the squared error to expect at every rate from 0 on, in the metric of the objective, [rates].

    A code of some rate leaves a certain share of what it codes (`DISTORTIONS`); with error feedback, what is coded of a
    column is what the columns before it leave undetermined, 1 / U_jj².
    """
    task = _task([replace(problem, size=1)])
    outliers, _ = _outliers(task, task.structure.outlier_count(problem.shape))
    variances = (task.weights[0] - outliers[0]).square().mean(dim=1).double()
    importance = row_importance(problem).to(variances)
    base = (variances * importance).sum().cpu() * undetermined(
        problem, None if task.roots is None else task.roots[0]
    ).sum().cpu()
    return base * torch.tensor([DISTORTIONS[size] for size in sorted(DISTORTIONS)], dtype=torch.float64)


@dataclass(frozen=True)
class _Task:
    """Matrices of one shape that are coded together.

    Attributes:
        structure: its options.
        weights: [members, rows, columns], float32.
        importance: of each row's squared error, of mean 1, [members, rows].
        diagonals: of the damped metric H of each member [members, columns]; None where all columns count alike.
        roots: upper U with H⁻¹ = UᵀU [members, columns, columns], or None.
        table: values of the states [states, width].
        bits: of a code.
        run: rows of a stream.
        progress: told how much is done.
    """

    structure: Trellis
    weights: Tensor
    importance: Tensor
    diagonals: Tensor | None
    roots: Tensor | None
    table: Tensor
    bits: int
    run: int
    progress: Sequence[Problem]

    def shaped(self, rows: Tensor) -> Tensor:
        """Return rows [members, rows, columns] so that their plain inner products are those in the metric: x U⁻¹."""
        if self.roots is None:
            return rows
        return torch.linalg.solve_triangular(self.roots, rows, upper=True, left=False)

    def total(self, shaped: Tensor) -> Tensor:
        """Return the weighted sum of squares of shaped rows, [members]."""
        return (shaped.square().sum(dim=2) * self.importance).sum(dim=1)


def _task(problems: Sequence[Problem]) -> _Task:
    first = problems[0]
    structure = first.structure
    assert isinstance(structure, Trellis)
    runtime = structure.runtime(first.size, first.shape)
    weights = torch.stack([weight.float() for problem in problems for weight in problem.weights])
    table = trellis_table(runtime["state_bits"], runtime["width"], runtime["bits"]).to(weights.device)
    importance = torch.stack([row_importance(problem).to(weights) for problem in problems])
    importance = importance / importance.mean(dim=1, keepdim=True).clamp_min(1e-30)
    metrics = [metric_of(problem) for problem in problems]
    diagonals = roots = None
    if metrics[0] is not None:
        flat = [tensor for found in metrics for tensor in found or ()]
        roots = inverse_roots(flat, DAMPING, weights.device)
        squares = torch.stack([tensor.diagonal() for tensor in flat]).to(weights)
        diagonals = squares / squares.mean(dim=1, keepdim=True).clamp_min(1e-30) + DAMPING
    return _Task(structure, weights, importance, diagonals, roots, table, runtime["bits"], runtime["run"], problems)


def _outliers(task: _Task, count: int) -> tuple[Tensor, Tensor | None]:
    """Return what is kept apart as matrices of zeros else, and its flat places [members, count] in their order.

    These are the weights that a scaled normal distribution would hardly reach, by what that would cost.
    """
    if not count:
        return torch.zeros_like(task.weights), None
    spread = task.weights.square().mean(dim=2, keepdim=True).sqrt()
    beyond = (task.weights.abs() - OUTLYING * spread).clamp_min(0).square() * task.importance[..., None]
    if task.diagonals is not None:
        beyond = beyond * task.diagonals[:, None, :]
    places = beyond.flatten(1).topk(count, dim=1).indices.sort(dim=1).values
    values = task.weights.flatten(1).gather(1, places)
    kept = torch.zeros_like(task.weights).flatten(1).scatter(1, places, values)
    return kept.view_as(task.weights), places


def _rounded_scales(scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return scales [members, rows] as they are stored, their codes, and the ranges of their logarithms [members, 2].

    The ranges are rounded to half precision here, so that storing them in it changes nothing.
    """
    # Rows of (nearly) nothing would stretch the range for all others.
    least = scales.amax(dim=1, keepdim=True).clamp_min(TINY) * 2.0**-16
    logarithms = scales.clamp_min(least).log2()
    low = logarithms.amin(dim=1).half().float()
    step = ((logarithms.amax(dim=1) - low) / 255).clamp_min(2.0**-12).half().float()
    codes = ((logarithms - low[:, None]) / step[:, None]).round().clamp(0, 255).to(torch.uint8)
    bounds = torch.stack([low, step], dim=1)
    rounded = torch.stack([decode_scales(c, b) for c, b in zip(codes, bounds, strict=True)])
    return rounded, codes, bounds


def _encode(rows: Tensor, weights: Tensor, task: _Task) -> Tensor:
    """Return the states [members, streams, column blocks, run] that stand for scaled rows [members, rows, columns].

    Args:
        rows: divided by their scales.
        weights: of a squared error in each row [members, rows].
        task: metric, table, and sizes.
    """
    members, count, columns = rows.shape
    width, run = task.table.shape[1], task.run
    streams = -(-count // run)
    filling = -columns % width
    # Rows that fill the last stream up count nothing. Within a stream: [run, streams], so that steps are contiguous.
    padded = torch.nn.functional.pad(rows, (0, filling, 0, streams * run - count))
    left = padded.unflatten(1, (streams, run)).transpose(1, 2).contiguous()
    weights = torch.nn.functional.pad(weights, (0, streams * run - count), value=TINY)
    weights = weights.unflatten(1, (streams, run)).transpose(1, 2).contiguous()
    roots = None if task.roots is None else _filled(task.roots, filling)
    blocks = left.shape[-1] // width
    states = torch.empty(members, streams, blocks, run, dtype=torch.int16, device=rows.device)
    at_once = max(1, COSTS_AT_ONCE // (run * len(task.table) * members))
    for first in range(0, streams, at_once):
        part = slice(first, min(first + at_once, streams))
        _encode_streams(
            left[:, :, part].clone(), weights[:, :, part], roots, states[:, part], task, part.stop / streams
        )
    return states


def _encode_streams(
    left: Tensor, weights: Tensor, roots: Tensor | None, states: Tensor, task: _Task, done: float
) -> None:
    """Fill `states` [members, streams, blocks, run] for rows [members, run, streams, columns], which are used up."""
    members, run, streams, columns = left.shape
    entries, width = task.table.shape
    unit = torch.eye(width, device=left.device).expand(members, -1, -1)
    costs = left.new_empty(members, run, streams, entries)
    last = torch.zeros(members, streams, dtype=torch.long, device=left.device)
    step = max(width, BLOCK // width * width)
    for start in range(0, columns, step):
        end = min(start + step, columns)
        errors = left.new_zeros(members, run, streams, end - start) if roots is not None else None
        for at in range(start, end, width):
            here = slice(at, at + width)
            target, table = left[..., here], task.table.expand(members, -1, -1)
            if roots is not None:
                # Both are brought into the metric that these columns have, given those before them.
                inverse = torch.linalg.solve_triangular(roots[:, here, here], unit, upper=True)
                target, table = (target.flatten(1, 2) @ inverse).unflatten(1, (run, streams)), table @ inverse
            _distances(target, table, weights, costs)
            path = _shortest_path(costs, last, task.bits)
            last = path[:, -1]
            states[:, :, at // width] = path.transpose(1, 2)
            if roots is None or errors is None:
                continue
            chosen = table.gather(1, path.flatten(1)[..., None].expand(-1, -1, width)).view_as(target)
            error = target - chosen
            errors[..., at - start : at - start + width] = error
            if at + width < end:
                later = error.flatten(1, 2) @ roots[:, here, at + width : end]
                left[..., at + width : end] -= later.unflatten(1, (run, streams))
        if roots is not None and errors is not None and end < columns:
            left[..., end:] -= (errors.flatten(1, 2) @ roots[:, start:end, end:]).unflatten(1, (run, streams))
        for problem in task.progress:
            problem.progress(0.98 * done * end / columns)


def _distances(target: Tensor, table: Tensor, weights: Tensor, costs: Tensor) -> None:
    """Fill `costs` [members, run, streams, entries] with weighted squared distances, by one product.

    Args:
        target: [members, run, streams, width].
        table: [members, entries, width].
        weights: [members, run, streams].
        costs: what is filled.
    """
    squared = target.square().sum(dim=-1, keepdim=True)
    left = torch.cat([target, squared, torch.ones_like(squared)], dim=-1) * weights[..., None]
    norms = table.square().sum(dim=-1, keepdim=True)
    right = torch.cat([-2 * table, torch.ones_like(norms), norms], dim=-1).transpose(1, 2)
    torch.bmm(left.flatten(1, 2), right, out=costs.flatten(1, 2))


def _shortest_path(costs: Tensor, last: Tensor, bits: int) -> Tensor:
    """Return the states [members, run, streams] of the cheapest path; `costs` become costs of paths.

    A state is followed by those whose older bits are its newer ones: s → (s · 2^bits + code) mod states.

    Args:
        costs: of each state at each step [members, run, streams, states].
        last: the state before the first step [members, streams].
        bits: of a code.
    """
    members, run, streams, count = costs.shape
    branches, older = 2**bits, count // 2**bits
    before = costs.new_full((members, streams, count), torch.inf).scatter_(2, last[..., None], 0.0)
    for step in range(run):
        # States that differ in their oldest code alone have the same successors: only the cheapest of them can win.
        cheapest = before.unflatten(2, (branches, older)).amin(dim=2)
        before = costs[:, step]
        before.unflatten(2, (older, branches)).add_(cheapest[..., None])
    path = torch.empty(members, run, streams, dtype=torch.long, device=costs.device)
    state = before.argmin(dim=2)
    path[:, -1] = state
    oldest = torch.arange(branches, device=costs.device) * older
    for step in range(run - 2, -1, -1):
        candidates = (state >> bits)[..., None] + oldest
        state = candidates.gather(2, costs[:, step].gather(2, candidates).argmin(dim=2, keepdim=True))[..., 0]
        path[:, step] = state
    return path


def _filled(roots: Tensor, filling: int) -> Tensor:
    """Return roots for columns that were filled up with zeros, which matter to nothing."""
    if not filling:
        return roots
    filled = torch.nn.functional.pad(roots, (0, filling, 0, filling))
    filled.diagonal(dim1=1, dim2=2)[:, -filling:] = 1
    return filled


def _decode(states: Tensor, task: _Task) -> Tensor:
    """Return scaled rows [members, rows, columns] of states [members, streams, blocks, run]."""
    rows = task.table[states.long()].transpose(2, 3).flatten(3).flatten(1, 2)
    return rows[:, : task.weights.shape[1], : task.weights.shape[2]]


def _packed(states: Tensor, task: _Task) -> Tensor:
    """Return the newest codes of states, each stream from its end to its beginning, packed [members, streams, bytes]."""
    codes = states.flatten(2).to(torch.int32) & (2**task.bits - 1)
    return pack(codes.flip(-1), task.bits)


def _packed_outliers(weight: Tensor, places: Tensor) -> dict[str, Tensor]:
    rows, columns = weight.shape
    return {
        "outlier_rows": pack(places // columns, index_bits(rows)),
        "outlier_columns": pack(places % columns, index_bits(columns)),
        "outlier_values": weight.flatten()[places],
    }
