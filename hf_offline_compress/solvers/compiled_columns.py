"""Trellis codes of a block of columns on CPUs, compiled by Numba: what `columns` does, several times as fast.

A stream is coded by itself, so that all it needs stays in the cache, and streams are shared among threads. Of the costs of
paths only those of one step are kept, and of the choices one byte a state that can follow. Sums are rounded otherwise than
PyTorch's, so a path may differ from that of `columns` where two cost nearly the same.
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

# With fewer branches, states are kept code after code, so that neighbours in memory have neighbours before them.
FEW_BRANCHES = 16
# States that are compared at once where few can follow.
LANES = 32


def code_columns(
    left: Tensor, block: Block | None, streams: Streams, code: Code, held: Held | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return the states [streams, steps, run] of a block of columns, and its errors; see `columns.code_columns`."""
    count, run, columns = left.shape
    states = torch.empty(count, -(-columns // code.width), run, dtype=torch.int16)
    errors = None if block is None else torch.empty_like(left)
    features, table = _features(code), code.table.contiguous().numpy()
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
        _code_streams(*(own[part] for own in of_streams), *matrices, errors is not None, features, table, code.bits)

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


def _features(code: Code) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return the features of the states as `_add_costs` reads them, [features, rows, neighbours]."""
    branches = 2**code.bits
    features = code.features().T.reshape(-1, len(code.table) // branches, branches)
    if branches < FEW_BRANCHES:
        features = features.transpose(1, 2)
    return features.contiguous().numpy()


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that is compiled at its first call, and kept for later processes where that can be done."""
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract", "nsz", "nnan"}}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # nowhere to keep it
        return numba.njit(**options)(function)


@_compiled
def _add_costs(features, factors, few, before, costs):  # type: ignore[no-untyped-def]
    """Set the costs of states to those of the paths before them and their own, factors · features.

    By rows of neighbours [rows, neighbours]: those of one code, each with its own path before it where branches are few,
    and else the branches of one path.
    """
    for row in range(costs.shape[0]):
        here, start = costs[row], before[row % len(before)]
        if len(factors) == 2:
            f0, f1 = features[0, row], features[1, row]
            k0, k1 = factors[0], factors[1]
            if few:
                for i in range(len(here)):
                    here[i] = before[i] + k0 * f0[i] + k1 * f1[i]
            else:
                for i in range(len(here)):
                    here[i] = start + k0 * f0[i] + k1 * f1[i]
        else:
            f0, f1, f2, f3, f4 = (
                features[0, row],
                features[1, row],
                features[2, row],
                features[3, row],
                features[4, row],
            )
            k0, k1, k2, k3, k4 = factors[0], factors[1], factors[2], factors[3], factors[4]
            if few:
                for i in range(len(here)):
                    here[i] = before[i] + k0 * f0[i] + k1 * f1[i] + k2 * f2[i] + k3 * f3[i] + k4 * f4[i]
            else:
                for i in range(len(here)):
                    here[i] = start + k0 * f0[i] + k1 * f1[i] + k2 * f2[i] + k3 * f3[i] + k4 * f4[i]


@_compiled
def _least(rows, best, which):  # type: ignore[no-untyped-def]
    """Set `best` [n] to the minima of rows [rows, n] over the rows, and `which` to the first row that has it."""
    for i in range(len(best)):
        best[i] = rows[0, i]
        which[i] = 0
    for r in range(1, rows.shape[0]):
        row = rows[r]
        for i in range(len(best)):
            cost, least = row[i], best[i]
            which[i] = r if cost < least else which[i]
            best[i] = min(cost, least)


@_compiled
def _survivors(costs, branches, few, best, which, before, oldest):  # type: ignore[no-untyped-def]
    """Set `before` [older] to the cost of the cheapest path of each that can follow, and `oldest` to its oldest code.

    States that differ in their oldest code alone have the same successors: only the cheapest of them can win.
    """
    older = len(before)
    if few:
        for code in range(branches):
            _least(costs[code].reshape(branches, older // branches), best, which)
            for i in range(len(best)):
                before[i * branches + code] = best[i]
                oldest[i * branches + code] = which[i]
        return
    wide = len(best)
    folds = wide // older
    _least(costs.reshape(costs.size // wide, wide), best, which)
    for i in range(older):
        least, first = best[i], which[i] * folds
        for fold in range(1, folds):
            if best[fold * older + i] < least:
                least, first = best[fold * older + i], which[fold * older + i] * folds + fold
        before[i] = least
        oldest[i] = first


@_compiled
def _path(features, factors, bits, last, end, path):  # type: ignore[no-untyped-def]
    """Set `path` [run] to the states of the cheapest path, by factors of each step [run, features].

    Its last state without the oldest code is `end`, or any if that is negative.
    """
    run, branches = len(path), 1 << bits
    rows, neighbours = features.shape[1], features.shape[2]
    count = rows * neighbours
    older = count // branches
    few = branches < FEW_BRANCHES
    costs = np.empty((rows, neighbours), np.float32)
    best = np.empty(older // branches if few else max(older, LANES), np.float32)
    which = np.empty(len(best), np.int32)
    before = np.full(older, np.inf, np.float32)
    before[last % older] = 0
    oldest = np.empty((run, older), np.int32)
    for step in range(run):
        _add_costs(features, factors[step], few, before, costs)
        if step < run - 1:
            _survivors(costs, branches, few, best, which, before, oldest[step])
    state: Any = 0
    least = np.float32(np.inf)
    if end < 0:
        state = costs.argmin()
        if few:
            state = state % older * branches + state // older
    else:
        for oldest_code in range(branches):
            one = oldest_code * older + end
            code, newer = one % branches, one // branches
            cost = costs[code, newer] if few else costs[newer, code]
            if cost < least:
                state, least = one, cost
    path[run - 1] = state
    for step in range(run - 2, -1, -1):
        newer = state >> bits
        state = newer + oldest[step, newer] * older
        path[step] = state


@_compiled
def _code_streams(  # type: ignore[no-untyped-def]
    left, held, errors, members, weights, ends, last, states, metrics, carried, coupled, features, table, bits
):
    """Code a block of columns of some streams; arguments as `code_columns` has them."""
    run, columns = left.shape[1], left.shape[2]
    width = table.shape[1]
    factors = np.empty((run, features.shape[0]), np.float32)
    path = np.empty(run, np.int64)
    for stream in range(len(left)):
        own, before, error, state = left[stream], held[stream], errors[stream], last[stream]
        carry = carried[members[stream]]
        for step in range(states.shape[1]):
            first = step * width
            single = width == 1 or first + 1 == columns
            metric = metrics[members[stream], step]
            m00, m01, m11 = metric[0, 0], np.float32(0), np.float32(0)
            if not single:
                m01, m11 = metric[0, 1], metric[1, 1]
            for row in range(run):
                weight, t0 = weights[stream, row], own[row, first]
                if width == 1:
                    factors[row, 0] = -2 * weight * t0 * m00
                    factors[row, 1] = weight * m00
                else:
                    t1 = np.float32(0) if single else own[row, first + 1]
                    factors[row, 0] = -2 * weight * (t0 * m00 + t1 * m01)
                    factors[row, 1] = -2 * weight * (t0 * m01 + t1 * m11)
                    factors[row, 2] = weight * m00
                    factors[row, 3] = 2 * weight * m01
                    factors[row, 4] = weight * m11
            _path(features, factors, bits, state, ends[stream, step], path)
            state = path[run - 1]
            for row in range(run):
                states[stream, step, row] = path[row]
            if not coupled:
                continue
            for row in range(run):
                x0, x1 = before[row, first] - table[path[row], 0], np.float32(0)
                error[row, first] = x0
                line = own[row]
                if single:
                    for column in range(first + 1, columns):
                        line[column] -= x0 * carry[first, column]
                else:
                    x1 = before[row, first + 1] - table[path[row], 1]
                    error[row, first + 1] = x1
                    for column in range(first + 2, columns):
                        line[column] -= x0 * carry[first, column] + x1 * carry[first + 1, column]
        last[stream] = state
