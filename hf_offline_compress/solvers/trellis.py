"""Trellis codes: the best path through all states by dynamic programming, with error feedback and descent over columns.

The streams of a matrix run down its rows, `width` columns at a time (see `Trellis`). Where errors are weighted by a
layer's inputs, a block of columns is coded only once all columns before it are, and absorbs their errors, as in GPTQ.
Within the block a row's error costs what it costs, however its neighbours were coded: so the best codes of a whole run of
rows are a cheapest path through the states, on which rows that matter more get the nearer values. Once all columns have codes,
each is coded again, the others as they are (`coupling`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch
from torch import Tensor

from ..runtime.packing_compressed import pack
from ..runtime.trellis_compressed import decode_scales, trellis_table
from ..structures import GroupShape, Mixture, Size, Trellis
from ..structures.trellis import DISTORTIONS, index_bits
from .base import Factors, Problem
from .columns import Code, Held, Streams, code_columns
from .coupling import Coupling, FirstTurn, NextTurn
from .feedback import BLOCK, DAMPING, damped_moments, inverse_roots, metric_of, row_importance, undetermined
from .mixtures import by_class, mixtures

# Numbers that path costs of one block of columns may be: so few that they stay in the cache, and small beside the model.
COSTS_AT_ONCE = 2**22
# In standard deviations of a row; values beyond are what outliers are looked for among.
OUTLYING = 3.0
TINY = 1e-12
# Of the scale that a row had at first, what is left where its codes fit it badly, or point away from it.
LEAST_FIT = 1 / 16
# Rows that are summed over at a time.
ROWS_AT_ONCE = 4096
# Numbers of which the largest are looked for at a time.
NUMBERS_AT_ONCE = 2**22


@torch.no_grad()
def solve_trellises(problems: Sequence[Problem]) -> list[Factors]:
    """Return codes, scales, classes and outliers for each problem; all are of one shape, objective and options.

    An embedding may be most of a model: little of its size is held at a time.
    """
    task = _task(problems)
    if task.moments:
        task = replace(task, roots=inverse_roots(task.moments, DAMPING, task.weights.device))
    total = (_squared_norms(task.shaped(task.weights)) * task.importance).sum(dim=1)
    outliers = _take_outliers(task, task.structure.outlier_count(problems[0].shape))
    scales, _, _ = _rounded_scales(_row_squares(task.weights).sqrt())
    task = _in_classes(task)
    weights = task.importance * scales.square()
    weights = weights / weights.mean(dim=1, keepdim=True).clamp_min(TINY)
    streams = _encode(task.sorted(task.weights / scales[..., None]), task.sorted(weights), task)
    wanted = task.shaped(task.sorted(task.weights))
    reached = task.shaped(_decoded(streams, task))
    best = _row_products(reached, wanted) / _squared_norms(reached).clamp_min(TINY)
    best = best.maximum(LEAST_FIT * task.sorted(scales))
    scales, codes, bounds = _rounded_scales(torch.empty_like(best).scatter_(1, task.order, best))
    left = reached.mul_(task.sorted(scales)[..., None]).sub_(wanted)
    lost = (_squared_norms(left) * task.sorted(task.importance)).sum(dim=1)
    del reached, wanted, left
    found = []
    for i, problem in enumerate(problems):
        mixture = task.mixtures[i]
        tensors = {"codes": _packed(streams[i], mixture, task), "scales": codes[i], "scale_range": bounds[i]}
        tensors |= _packed_classes(mixture, task.order[i], task.run)
        if outliers is not None:
            tensors |= _packed_outliers(problem.shape, outliers[0][i], outliers[1][i])
        found.append(
            Factors((tensors,), {}, {"error": float((lost[i] / total[i].clamp_min(TINY)).clamp_min(0).sqrt())})
        )
        problem.progress(1.0)
    return found


@torch.no_grad()
def trellis_errors(problem: Problem) -> dict[Size, float]:
    """Return the squared error to expect, in the metric of the objective, at every rate from 0 on, and of mixtures.

    A code of some rate leaves a certain share of what it codes (`DISTORTIONS`); with error feedback, what is coded of a
    column is what the columns before it leave undetermined, 1 / U_jj².
    """
    task = _task([replace(problem, size=1)])
    _take_outliers(task, task.structure.outlier_count(problem.shape))
    variances = _row_squares(task.weights)[0].double()
    energies = (variances * row_importance(problem).to(variances)).cpu() * undetermined(problem).cpu().sum()
    found: dict[Size, float] = {size: float(energies.sum()) * DISTORTIONS[size] for size in sorted(DISTORTIONS)}
    # Within a stream the path favours the rows that matter, by itself; where that is enough, classes gain nothing.
    return found | (mixtures(energies, task.run) if problem.embedding else {})


@dataclass(frozen=True)
class _Task:
    """Matrices of one shape that are coded together.

    Attributes:
        structure: its options.
        weights: [members, rows, columns], float32; a copy, from which outliers are taken out.
        importance: of each row's squared error, of mean 1, [members, rows].
        moments: E[x xᵀ] of each member [columns, columns]; none where all columns count alike.
        diagonals: of the damped metric H of each member [members, columns], or None.
        roots: upper U with H⁻¹ = UᵀU [members, columns, columns], or None; needed where something is coded.
        run: rows of a stream.
        passes: how often all columns are coded again.
        mixtures: rates of each member.
        order: rows as the streams have them, class after class, [members, rows].
        progress: told how much is done.
    """

    structure: Trellis
    weights: Tensor
    importance: Tensor
    moments: Sequence[Tensor]
    diagonals: Tensor | None
    roots: Tensor | None
    run: int
    passes: int
    mixtures: Sequence[Mixture]
    order: Tensor
    progress: Sequence[Problem]

    def sorted(self, numbers: Tensor) -> Tensor:
        """Return rows, or numbers of rows, [members, rows, …], in the order of the streams."""
        if all(len(mixture.classes) == 1 for mixture in self.mixtures):
            return numbers
        members = torch.arange(len(numbers), device=numbers.device)[:, None]
        return numbers[members, self.order]

    def shaped(self, rows: Tensor) -> Tensor:
        """Return rows [members, rows, columns] so that their plain inner products are those in the metric: x U⁻¹."""
        if self.roots is None:
            return rows
        return torch.linalg.solve_triangular(self.roots, rows, upper=True, left=False)

    def metric(self, member: int) -> Tensor:
        """Return the damped metric H of a member [columns, columns], float32; `moments` are there."""
        return damped_moments(self.moments[member], DAMPING, self.weights.device).float()


def _task(problems: Sequence[Problem]) -> _Task:
    """Return the problems as one task, rows still in their own order."""
    first = problems[0]
    structure = first.structure
    assert isinstance(structure, Trellis)
    weights = torch.stack([weight.float() for problem in problems for weight in problem.weights])
    importance = torch.stack([row_importance(problem).to(weights) for problem in problems])
    importance = importance / importance.mean(dim=1, keepdim=True).clamp_min(1e-30)
    moments = [tensor for problem in problems for tensor in metric_of(problem) or ()]
    diagonals = None
    if moments:
        squares = torch.stack([tensor.diagonal() for tensor in moments]).to(weights)
        diagonals = squares / squares.mean(dim=1, keepdim=True).clamp_min(1e-30) + DAMPING
    order = torch.arange(weights.shape[1], device=weights.device).expand(len(weights), -1)
    mixtures = [structure.mixture(problem.size, problem.shape) for problem in problems]
    run = structure.rows_a_stream(first.shape)
    return _Task(structure, weights, importance, moments, diagonals, None, run, first.passes, mixtures, order, problems)


def _in_classes(task: _Task) -> _Task:
    """Return the task with its rows in the order of their classes."""
    if all(len(mixture.classes) == 1 for mixture in task.mixtures):
        return task
    energies, order = _row_squares(task.weights) * task.importance, task.order.clone()
    for i, mixture in enumerate(task.mixtures):
        if len(mixture.classes) > 1:
            order[i] = by_class(energies[i], [task.run * streams for _, streams in mixture.classes])
    return replace(task, order=order)


def _take_outliers(task: _Task, count: int) -> tuple[Tensor, Tensor] | None:
    """Take the outliers out of the task's weights: return their flat places in order, and their values [members, count].

    These are the weights that a scaled normal distribution would hardly reach, by what that would cost.
    """
    if not count:
        return None
    beyond = task.weights.abs().sub_(OUTLYING * _row_squares(task.weights).sqrt()[..., None]).clamp_min_(0).square_()
    beyond *= task.importance[..., None]
    if task.diagonals is not None:
        beyond *= task.diagonals[:, None, :]
    places = _largest(beyond.flatten(1), count).sort(dim=1).values
    values = task.weights.flatten(1).gather(1, places)
    task.weights.view(len(places), -1).scatter_(1, places, 0.0)
    return places, values


def _largest(numbers: Tensor, count: int) -> Tensor:
    """Return the places of the largest numbers [members, numbers]; of one part after the other, as finding them takes memory."""
    kept, places = [], []
    for start in range(0, numbers.shape[1], NUMBERS_AT_ONCE):
        part = numbers[:, start : start + NUMBERS_AT_ONCE]
        found = part.topk(min(count, part.shape[1]), dim=1)
        kept.append(found.values)
        places.append(found.indices + start)
    return torch.cat(places, dim=1).gather(1, torch.cat(kept, dim=1).topk(count, dim=1).indices)


def _row_products(first: Tensor, second: Tensor) -> Tensor:
    """Return the inner products of the rows of two tensors [members, rows, columns], with a few rows at a time."""
    pairs = zip(first.split(ROWS_AT_ONCE, dim=1), second.split(ROWS_AT_ONCE, dim=1), strict=True)
    return torch.cat([(one * other).sum(dim=2) for one, other in pairs], dim=1)


def _squared_norms(rows: Tensor) -> Tensor:
    """Return the sums of squares of rows [members, rows, columns]."""
    return _row_products(rows, rows)


def _row_squares(rows: Tensor) -> Tensor:
    """Return the mean squares of rows [members, rows, columns]."""
    return _squared_norms(rows) / rows.shape[2]


def _rounded_scales(scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return scales [members, rows] as they are stored, their codes, and the ranges of their logarithms [members, 2].

    The ranges are rounded to what both half precisions represent, outwards, so that no dtype that a model is loaded in
    changes them: an error in a step would be multiplied by codes of up to 255.
    """
    # Rows of (nearly) nothing would stretch the range for all others.
    least = scales.amax(dim=1, keepdim=True).clamp_min(TINY) * 2.0**-16
    logarithms = scales.clamp_min(least).log2()
    low = _to_eight_digits(logarithms.amin(dim=1), torch.floor)
    step = _to_eight_digits(((logarithms.amax(dim=1) - low) / 255).clamp_min(2.0**-12), torch.ceil)
    codes = ((logarithms - low[:, None]) / step[:, None]).round().clamp(0, 255).to(torch.uint8)
    bounds = torch.stack([low, step], dim=1)
    rounded = torch.stack([decode_scales(c, b) for c, b in zip(codes, bounds, strict=True)])
    return rounded, codes, bounds


def _to_eight_digits(numbers: Tensor, towards: Callable[[Tensor], Tensor]) -> Tensor:
    """Return numbers of at most eight binary digits, as bfloat16 has: the nearest ones below (`floor`) or above (`ceil`)."""
    digits, exponents = torch.frexp(numbers)
    return torch.ldexp(towards(digits * 2.0**8), exponents - 8)


def _encode(rows: Tensor, weights: Tensor, task: _Task) -> list[list[Tensor]]:
    """Return for each member and class of rows the states [streams, column blocks, run] of its codes.

    Args:
        rows: divided by their scales, in the order of the streams [members, rows, columns].
        weights: of a squared error in each row [members, rows].
        task: metric and sizes.
    """
    streams = task.structure.streams(task.progress[0].shape)
    # Rows that fill the last stream up count nothing.
    filling = streams * task.run - rows.shape[1]
    left = torch.nn.functional.pad(rows, (0, 0, 0, filling)) if filling else rows
    del rows
    left = left.unflatten(1, (streams, task.run))
    weights = torch.nn.functional.pad(weights, (0, filling), value=TINY).unflatten(1, (streams, task.run))
    # Streams of one rate are coded together, whichever matrix they are of.
    alike: dict[int, list[tuple[int, int]]] = {}
    for member, mixture in enumerate(task.mixtures):
        rates = [step for step, count in mixture.classes for _ in range(count)]
        for stream, step in enumerate(rates):
            alike.setdefault(step, []).append((member, stream))
    states: dict[tuple[int, int], Tensor] = {}
    for step, places in alike.items():
        code = _code(step, task)
        at_once = max(1, COSTS_AT_ONCE // (task.run * len(code.table)))
        for start in range(0, len(places), at_once):
            here = places[start : start + at_once]
            members, which = (torch.tensor(index, device=left.device) for index in zip(*here, strict=True))

            def progress(share: float, done: int = len(states), more: int = len(here)) -> None:
                for problem in task.progress:
                    problem.progress(0.98 * (done + share * more) / (streams * len(task.mixtures)))

            coded = Streams(weights[members, which], members, torch.zeros_like(members))
            found = _encode_streams(left[members, which], task, coded, code, progress)
            states |= dict(zip(here, found, strict=True))
    result = []
    for member, mixture in enumerate(task.mixtures):
        own = iter(states[member, stream] for stream in range(streams))
        result.append([torch.stack([next(own) for _ in range(count)]) for _, count in mixture.classes])
    return result


def _code(step: int, task: _Task) -> Code:
    """Return the code of a step of the rate."""
    code = task.structure.code(step)
    return Code(trellis_table(**code).to(task.weights.device), code["bits"])


def is_searched_slowly(device: torch.device) -> bool:
    """Return whether codes are found several times as fast on a device where Numba is installed, and it is not."""
    return device.type == "cpu" and _coder(device) is code_columns


def _coder(device: torch.device) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """Return what codes a block of columns on a device."""
    if device.type == "cpu" and find_spec("numba"):
        try:
            from .compiled_columns import code_columns as compiled
        except (ImportError, SystemError):  # it is there, but not for this version of NumPy or Python
            return code_columns
        return compiled
    return code_columns


def _encode_streams(
    rows: Tensor, task: _Task, streams: Streams, code: Code, progress: Callable[[float], None]
) -> Tensor:
    """Return the states [streams, column steps, run] of streams of one rate.

    Args:
        rows: of the streams [streams, run, columns].
        task: metric, and how often all columns are coded again.
        streams: weights of their rows, and which matrix each is of.
        code: of the rate.
        progress: called with the share that is done.
    """
    if task.roots is None:
        return _take_turn(rows, None, streams, code, progress)
    segments, passes = _segments(streams), task.passes
    turns = len(segments) * (1 + passes)

    def progress_of(turn: int, count: int = 1) -> Callable[[float], None]:
        return lambda share: progress((turn + count * share) / turns)

    first_turn = FirstTurn(task.roots, code.width)
    states = _take_turn(rows.clone(), first_turn, streams, code, progress_of(0, len(segments)))
    # One matrix after the other: the metric of each is large.
    for number, (member, part) in enumerate(segments if passes else ()):
        own = Streams(streams.weights[part], torch.zeros_like(streams.members[part]), streams.last[part])
        next_turn = NextTurn.of(task.metric(member)[None], code.width)
        for turn in range(passes):
            told = progress_of(len(segments) + number * passes + turn)
            states[part] = _again(rows[part], states[part], next_turn, own, code, told)
    return states


def _again(
    rows: Tensor,
    states: Tensor,
    coupling: NextTurn,
    streams: Streams,
    code: Code,
    progress: Callable[[float], None],
) -> Tensor:
    """Return the states of streams of one matrix that all have codes already, each column coded again in turn."""
    held = Held.of(states, code, rows.shape[2])
    # Rows are scaled in the end so that their codes fit best: here they are divided by these scales.
    scales = _fitted_scales(held.values, rows, coupling.metrics[0])
    targets = coupling.targets(held.values, rows / scales[..., None])
    again = Streams(streams.weights * scales.square(), streams.members, torch.zeros_like(streams.last))
    return _take_turn(targets, coupling, again, code, progress, held)


def _fitted_scales(values: Tensor, rows: Tensor, metric: Tensor) -> Tensor:
    """Return by what values [streams, run, columns] come nearest to rows in a metric [columns, columns], [streams, run].

    No scale is below the least that may be stored: a fit within the same bounds each time is never worse than the last.
    """
    shaped = values @ metric
    scales = (shaped * rows).sum(dim=2) / (shaped * values).sum(dim=2).clamp_min(TINY)
    return scales.clamp_min(LEAST_FIT)


def _segments(streams: Streams) -> list[tuple[int, slice]]:
    """Return the matrices that streams are of, and which of the streams each has."""
    members, counts = streams.members.unique_consecutive(return_counts=True)
    ends = counts.cumsum(0)
    return list(zip(members.tolist(), map(slice, (ends - counts).tolist(), ends.tolist()), strict=True))


def _take_turn(
    left: Tensor,
    coupling: Coupling | None,
    streams: Streams,
    code: Code,
    progress: Callable[[float], None],
    held: Held | None = None,
) -> Tensor:
    """Return the states [streams, column steps, run] of columns that are coded one block after the other.

    Args:
        left: their targets [streams, run, columns], used up.
        coupling: how columns depend on each other, or None.
        streams: weights of their rows, and which matrix each is of.
        code: of the rate.
        progress: called with the share that is done.
        held: what they were coded as before, if they were.
    """
    columns, block = left.shape[2], BLOCK // code.width * code.width
    coder, segments, states = _coder(left.device), _segments(streams), []
    for start in range(0, columns, block):
        end = min(start + block, columns)
        own = None if coupling is None else coupling.block(start, end)
        before = None if held is None else held.part(start, end, code.width)
        found, errors = coder(left[:, :, start:end].contiguous(), own, streams, code, before)
        states.append(found)
        if coupling is not None and errors is not None and end < columns:
            for member, part in segments:
                handed = errors[part].flatten(0, 1) @ coupling.beyond(member, start, end)
                left[part, :, end:] -= handed.unflatten(0, (-1, left.shape[1]))
        progress(end / columns)
    return torch.cat(states, dim=1)


def _decoded(streams: list[list[Tensor]], task: _Task) -> Tensor:
    """Return the rows that states of all members stand for, unscaled, in the order of the streams."""
    rows = torch.empty_like(task.weights)
    for own, mixture, into in zip(streams, task.mixtures, rows, strict=True):
        first = 0
        for states, (step, _) in zip(own, mixture.classes, strict=True):
            table = _code(step, task).table
            for stream in states:  # [blocks, run]
                part = into[first : first + task.run]
                part.copy_(table[stream.long()].transpose(0, 1).flatten(1)[: len(part), : part.shape[1]])
                first += len(part)
    return rows


def _packed(states: list[Tensor], mixture: Mixture, task: _Task) -> Tensor:
    """Return the newest codes of a member's states, each stream from its end to its beginning, packed [bytes]."""
    packed = []
    for own, (step, _) in zip(states, mixture.classes, strict=True):
        bits = task.structure.code(step)["bits"]
        codes = own.flatten(1).to(torch.int32) & (2**bits - 1)
        packed.append(pack(codes.flip(-1), bits).flatten())
    return torch.cat(packed)


def _packed_classes(mixture: Mixture, order: Tensor, run: int) -> dict[str, Tensor]:
    """Return the classes of a member's rows, which the streams have in an order [rows]; nothing where there is one."""
    if len(mixture.classes) == 1:
        return {}
    kinds = [kind for kind, (_, streams) in enumerate(mixture.classes) for _ in range(run * streams)]
    classes = torch.empty_like(order).scatter_(0, order, torch.tensor(kinds[: len(order)], device=order.device))
    return {"classes": pack(classes, index_bits(len(mixture.classes)))}


def _packed_outliers(shape: GroupShape, places: Tensor, values: Tensor) -> dict[str, Tensor]:
    return {
        "outlier_rows": pack(places // shape.columns, index_bits(shape.rows)),
        "outlier_columns": pack(places % shape.columns, index_bits(shape.columns)),
        "outlier_values": values,
    }
