"""Trellis codes of a block of columns on CPUs, compiled by Numba: what `columns` does, several times as fast.

A stream is coded by itself, so that all it needs stays in the cache, and streams are shared among threads. Of the costs of
paths only those of one step are kept, and of the choices the oldest code of each state that can follow. Sums are rounded
otherwise than PyTorch's, so a path may differ from that of `columns` where two cost nearly the same.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from .columns import Code, Held, Streams
from .coupling import Block

# States that are compared at once where few can follow.
LANES = 32


def code_columns(
    left: Tensor, block: Block | None, streams: Streams, code: Code, held: Held | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return the states [streams, steps, run] of a block of columns, and its errors; see `columns.code_columns`."""
    count, run, columns = left.shape
    states = torch.empty(count, -(-columns // code.width), run, dtype=torch.int16)
    errors = None if block is None else torch.empty_like(left)
    table = code.table.T.contiguous().numpy()
    if block is None:
        unit = torch.eye(code.width).expand(1, states.shape[1], -1, -1)
        block, members = Block(unit, left[:1, 0, :, None]), torch.zeros_like(streams.members)
    else:
        members = streams.members
    matrices = [part.contiguous().numpy() for part in block]
    ends = torch.full(states.shape[:2], -1, dtype=torch.int32) if held is None else held.ends
    of_streams = [
        tensor.numpy()
        for tensor in (
            left,
            left if held is None else held.values,
            left if errors is None else errors,
            members.contiguous(),
            streams.weights.contiguous(),
            ends,
            streams.last,
            states,
        )
    ]

    def work(part: slice) -> None:
        _code_streams(*(own[part] for own in of_streams), *matrices, errors is not None, table, code.bits)

    threads = max(1, min(torch.get_num_threads(), count))
    # A few parts a thread, so that all end at the same time.
    bounds = np.linspace(0, count, min(count, 4 * threads) + 1 if threads > 1 else 2).astype(int).tolist()
    parts = [slice(*ends) for ends in pairwise(bounds)]
    if len(parts) == 1:
        work(parts[0])
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, parts))
    return states, errors


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that is compiled at its first call, and kept for later processes where that can be done."""
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract", "nsz", "nnan"}}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # nowhere to keep it
        return numba.njit(**options)(function)


@_compiled
def _add_costs(before, values, squares, factors, costs):  # type: ignore[no-untyped-def]
    """Set costs [states] to those of the paths before them and their own: factors · (values, squares)."""
    first, k0, weight = values[0], factors[0], factors[-1]
    if len(values) == 1:
        for i in range(len(costs)):
            costs[i] = before[i] + k0 * first[i] + weight * squares[i]
    else:
        second, k1 = values[1], factors[1]
        for i in range(len(costs)):
            costs[i] = before[i] + k0 * first[i] + k1 * second[i] + weight * squares[i]


@_compiled
def _least(rows, best, which):  # type: ignore[no-untyped-def]
    """Set `best` [n] to the minima of rows [rows, n] over the rows, and `which` to the first row that has it.

    Two rows are compared at a time, so that `best` and `which` are read and written half as often.
    """
    for r in range(0, len(rows), 2):
        one, other = rows[r], rows[r + 1]
        for i in range(len(best)):
            row = r + 1 if other[i] < one[i] else r
            cost = min(one[i], other[i])
            least = best[i] if r else np.float32(np.inf)
            which[i] = row if cost < least else which[i]
            best[i] = min(cost, least)


@_compiled
def _survivors(costs, best, which, oldest):  # type: ignore[no-untyped-def]
    """Set the first of `best` to the cost of the cheapest path of each state that can follow, `oldest` to its oldest code.

    States that differ in their oldest code alone have the same successors: only the cheapest of them can win.
    """
    older, wide = len(oldest), len(best)
    _least(costs.reshape(costs.size // wide, wide), best, which)
    folds = wide // older
    for i in range(older):
        oldest[i] = which[i] * folds
    for fold in range(1, folds):
        others, theirs = best[fold * older :], which[fold * older :]
        for i in range(older):
            better = others[i] < best[i]
            oldest[i] = theirs[i] * folds + fold if better else oldest[i]
            best[i] = min(others[i], best[i])


@_compiled
def _repeat(numbers, bits, into):  # type: ignore[no-untyped-def]
    """Set `into` to each number 2^bits times. Loops of constant length become vector instructions, up to eight numbers."""
    if bits == 1:
        for i in range(len(into) // 2):
            for k in range(2):
                into[2 * i + k] = numbers[i]
    elif bits == 2:
        for i in range(len(into) // 4):
            for k in range(4):
                into[4 * i + k] = numbers[i]
    else:
        for i in range(len(into) // 8):
            for k in range(8):
                into[8 * i + k] = numbers[i]


@_compiled
def _spread(best, bits, scratch, before):  # type: ignore[no-untyped-def]
    """Set `before` [states] to the cost of the path that each state goes on from, its code left out of its number."""
    eighth, rest = scratch[: len(before) // 8], scratch[len(before) // 8 :]
    if bits > 6:
        _repeat(best, bits - 6, rest[: len(eighth) // 8])
        _repeat(rest, 3, eighth)
        _repeat(eighth, 3, before)
    elif bits > 3:
        _repeat(best, bits - 3, eighth)
        _repeat(eighth, 3, before)
    else:
        _repeat(best, bits, before)


@_compiled
def _path(values, squares, factors, bits, last, end, path):  # type: ignore[no-untyped-def]
    """Set `path` [run] to the states of the cheapest path.

    Args:
        values: of the states [width, states].
        squares: of the same in the metric of the step [states].
        factors: what both cost in each row, [run, width + 1].
        bits: of a code.
        last: state before the path.
        end: its last state without the oldest code, or any if that is negative.
        path: the result.
    """
    run, branches, count = len(path), 1 << bits, len(squares)
    older = count // branches
    costs, before = np.empty(count, np.float32), np.empty(count, np.float32)
    best, scratch = np.full(max(older, LANES), np.inf, np.float32), np.empty(count // 4, np.float32)
    which, oldest = np.zeros(len(best), np.int32), np.empty((run, older), np.int32)
    best[last % older] = 0
    for step in range(run):
        _spread(best, bits, scratch, before)
        _add_costs(before, values, squares, factors[step], costs)
        if step < run - 1:
            _survivors(costs, best, which, oldest[step])
    state: Any = 0
    least = np.float32(np.inf)
    if end < 0:
        state = costs.argmin()
    else:
        for code in range(branches):
            one = code * older + end
            if costs[one] < least:
                state, least = one, costs[one]
    path[run - 1] = state
    for step in range(run - 2, -1, -1):
        newer = state >> bits
        state = newer + oldest[step, newer] * older
        path[step] = state


@_compiled
def _squares(values, metric, single, squares):  # type: ignore[no-untyped-def]
    """Set `squares` [states] to the squared lengths of values [width, states] in a metric, of the first alone if `single`."""
    first, m00 = values[0], metric[0, 0]
    if single:
        for i in range(len(squares)):
            squares[i] = m00 * first[i] * first[i]
    else:
        second, m01, m11 = values[1], 2 * metric[0, 1], metric[1, 1]
        for i in range(len(squares)):
            squares[i] = m00 * first[i] * first[i] + m01 * first[i] * second[i] + m11 * second[i] * second[i]


@_compiled
def _code_streams(  # type: ignore[no-untyped-def]
    left, held, errors, members, weights, ends, last, states, metrics, carried, coupled, table, bits
):
    """Code a block of columns of some streams; arguments as `code_columns` has them, the table [width, states]."""
    run, columns = left.shape[1], left.shape[2]
    width = len(table)
    factors = np.empty((run, width + 1), np.float32)
    squares = np.empty(table.shape[1], np.float32)
    path = np.empty(run, np.int64)
    for stream in range(len(left)):
        own, before, error, state = left[stream], held[stream], errors[stream], last[stream]
        carry = carried[members[stream]]
        for step in range(states.shape[1]):
            first = step * width
            single = width == 1 or first + 1 == columns
            metric = metrics[members[stream], step]
            _squares(table, metric, single, squares)
            for row in range(run):
                weight, t0 = weights[stream, row], own[row, first]
                factors[row, width] = weight
                if single:
                    factors[row, width - 1] = 0  # of a second number that is in no column
                    factors[row, 0] = -2 * weight * t0 * metric[0, 0]
                else:
                    t1 = own[row, first + 1]
                    factors[row, 0] = -2 * weight * (t0 * metric[0, 0] + t1 * metric[0, 1])
                    factors[row, 1] = -2 * weight * (t0 * metric[0, 1] + t1 * metric[1, 1])
            _path(table, squares, factors, bits, state, ends[stream, step], path)
            state = path[run - 1]
            for row in range(run):
                states[stream, step, row] = path[row]
            if not coupled:
                continue
            for row in range(run):
                x0, x1 = before[row, first] - table[0, path[row]], np.float32(0)
                error[row, first] = x0
                line = own[row]
                if single:
                    for column in range(first + 1, columns):
                        line[column] -= x0 * carry[first, column]
                else:
                    x1 = before[row, first + 1] - table[1, path[row]]
                    error[row, first + 1] = x1
                    for column in range(first + 2, columns):
                        line[column] -= x0 * carry[first, column] + x1 * carry[first + 1, column]
        last[stream] = state
