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

from .columns import Code, Streams

# With fewer branches, states are kept code after code, so that neighbours in memory have neighbours before them.
FEW_BRANCHES = 16
# States that are compared at once where few can follow.
LANES = 32


def code_columns(left: Tensor, roots: Tensor | None, streams: Streams, code: Code) -> tuple[Tensor, Tensor | None]:
    """Return the states [streams, steps, run] of a block of columns, and its errors; see `columns.code_columns`."""
    count, run, columns = left.shape
    states = torch.empty(count, -(-columns // code.width), run, dtype=torch.int16)
    errors = torch.empty_like(left) if roots is not None else None
    table, features = code.table.contiguous().numpy(), _features(code)
    metric = (left[:1, 0, :, None] if roots is None else roots).contiguous().numpy()
    members, own = streams.members.contiguous().numpy(), streams.weights.contiguous().numpy()
    last, found = streams.last.numpy(), states.numpy()
    reached = left.numpy() if errors is None else errors.numpy()

    def work(part: slice) -> None:
        _code_streams(
            left.numpy()[part],
            reached[part],
            metric,
            roots is not None,
            members[part],
            own[part],
            features,
            table,
            code.bits,
            last[part],
            found[part],
        )

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
def _path(features, factors, bits, last, path):  # type: ignore[no-untyped-def]
    """Set `path` [run] to the states of the cheapest path, by factors of each step [run, features]."""
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
    state = costs.argmin()
    if few:
        state = state % older * branches + state // older
    path[run - 1] = state
    for step in range(run - 2, -1, -1):
        newer = state >> bits
        state = newer + oldest[step, newer] * older
        path[step] = state


@_compiled
def _code_streams(left, errors, roots, fed_back, members, weights, features, table, bits, last, states):  # type: ignore[no-untyped-def]
    """Code a block of columns of some streams; arguments as `code_columns` has them."""
    run, columns = left.shape[1], left.shape[2]
    width = table.shape[1]
    factors = np.empty((run, features.shape[0]), np.float32)
    path = np.empty(run, np.int64)
    for stream in range(len(left)):
        own, error, root, state = left[stream], errors[stream], roots[members[stream] if fed_back else 0], last[stream]
        for step in range(states.shape[1]):
            first = step * width
            single = width == 1 or first + 1 == columns
            # The inverse of the root's part, upper triangular, brings errors into the metric of these columns.
            e00, e01, e11 = np.float32(1), np.float32(0), np.float32(0 if single else 1)
            if fed_back:
                e00 = 1 / root[first, first]
                if not single:
                    e11 = 1 / root[first + 1, first + 1]
                    e01 = -root[first, first + 1] * e00 * e11
            m00, m01, m11 = e00 * e00 + e01 * e01, e01 * e11, e11 * e11
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
            _path(features, factors, bits, state, path)
            state = path[run - 1]
            for row in range(run):
                states[stream, step, row] = path[row]
            if not fed_back:
                continue
            for row in range(run):
                d0 = own[row, first] - table[path[row], 0]
                x0, x1 = d0 * e00, np.float32(0)
                error[row, first] = x0
                if not single:
                    x1 = d0 * e01 + (own[row, first + 1] - table[path[row], 1]) * e11
                    error[row, first + 1] = x1
                line = own[row]
                if single:
                    for column in range(first + 1, columns):
                        line[column] -= x0 * root[first, column]
                else:
                    for column in range(first + 2, columns):
                        line[column] -= x0 * root[first, column] + x1 * root[first + 1, column]
        last[stream] = state
