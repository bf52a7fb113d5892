"""The cheapest path through the states of a trellis (Viterbi, 1967; Marcellin & Fischer, 1990)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor


def viterbi_path(costs: Tensor, last: Tensor, bits: int, ends: Tensor | None = None) -> Tensor:
    """Return the states [steps, streams] of the cheapest path of each stream; `costs` become costs of paths.

    A state is followed by those whose older bits are its newer ones: s → (s · 2^bits + code) mod states. Streams come last
    in what is worked on, so that what is done with a state is done for many neighbours in memory at once.

    Args:
        costs: of each state at each step [steps, states, streams].
        last: the state before the first step [streams].
        bits: of a code.
        ends: the last state of each without its oldest code, or -1 where any will do [streams]; None: any, for all.
    """
    steps, count, streams = costs.shape
    branches, older = 2**bits, count // 2**bits
    begin = costs.new_full((older, 1, streams), torch.inf).scatter_(0, (last % older)[None, None], 0.0)
    # Many calls for little work each, which NumPy makes in half the time; the rest of what is said here holds for both.
    on_cpu = costs.device.type == "cpu"
    least: Callable[[Any, int], Any] = np.minimum.reduce if on_cpu else torch.amin
    numbers, before, each = (
        tensor.numpy() if on_cpu else tensor for tensor in (costs, begin, torch.arange(streams, device=costs.device))
    )
    by_code = numbers.reshape(steps, older, branches, streams)
    by_oldest = numbers.reshape(steps, branches, older, streams)
    for step in range(steps):
        here = by_code[step]
        here += before
        # States that differ in their oldest code alone have the same successors: only the cheapest of them can win.
        before = least(by_oldest[step], 0)[:, None]
    if ends is not None:
        newest = torch.arange(count, device=costs.device)[:, None] % older
        costs[-1].masked_fill_((newest != ends) & (ends >= 0), torch.inf)
    path = [numbers[-1].argmin(0)]
    for step in range(steps - 2, -1, -1):
        newer = path[-1] >> bits
        path.append(newer + by_oldest[step][:, newer, each].argmin(0) * older)
    return torch.stack([torch.as_tensor(state) for state in reversed(path)])
