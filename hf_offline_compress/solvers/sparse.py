"""Pruning: the weights of the highest score are kept, and the gaps between them packed."""

from __future__ import annotations

import torch
from torch import Tensor

from ..runtime.packing_compressed import pack
from ..structures import Sparse
from .base import Factors, Problem


@torch.no_grad()
def solve_sparse(problem: Problem) -> Factors:
    """Return the values of highest score and the gaps between them; or the matrix with zeros for the others.

    The score of a weight is its squared size, times the mean squared input of its column where that is known (Wanda: Sun
    et al., ICLR 2024), the importance of its row, or its own.
    """
    structure, shape = problem.structure, problem.shape
    assert isinstance(structure, Sparse)
    (weight,) = problem.weights
    weight = weight.float()
    order = _scores(problem, weight).flatten().argsort(descending=True, stable=True)
    if not structure.compact:
        kept = torch.zeros_like(weight).flatten()
        kept[order[: problem.integer_size]] = weight.flatten()[order[: problem.integer_size]]
        return Factors(({"values": kept.view_as(weight)},), {}, {"kept": min(problem.integer_size, len(order))})
    longest = 2 ** structure.gap_bits(problem.integer_size, shape)
    # Long gaps cost stored zeros, so fewer weights than `size` may fit; how many is found by bisection.
    low, high = 0, min(problem.integer_size, len(order))
    while low < high:
        middle = (low + high + 1) // 2
        if _stored(order[:middle], longest) <= problem.integer_size:
            low = middle
        else:
            high = middle - 1
    places = order[:low].sort().values
    steps = places.diff(prepend=places.new_tensor([-1]))
    ends = (-(-steps // longest)).cumsum(0) - 1  # where among the stored values the kept ones come
    gaps = torch.zeros(problem.integer_size, dtype=torch.int32, device=weight.device)
    gaps[: int(ends[-1]) + 1 if low else 0] = longest - 1
    gaps[ends] = ((steps - 1) % longest).to(torch.int32)
    values = weight.new_zeros(problem.integer_size)
    values[ends] = weight.flatten()[places]
    packed = pack(gaps, structure.gap_bits(problem.integer_size, shape))
    return Factors(({"values": values, "gaps": packed},), {}, {"kept": low})


def _stored(chosen: Tensor, longest: int) -> int:
    """Return how many values are stored for the chosen places, zeros on the way included."""
    steps = chosen.sort().values.diff(prepend=chosen.new_tensor([-1]))
    return int((-(-steps // longest)).sum())


def _scores(problem: Problem, weight: Tensor) -> Tensor:
    scores = weight.square()
    if problem.input_moments is not None:
        scores = scores * problem.input_moments.diagonal().to(scores).clamp_min(0)
    if problem.row_weights is not None:
        scores = scores * problem.row_weights.to(scores)[:, None]
    if problem.parameter_weights is not None:
        scores = scores * problem.parameter_weights[0].to(scores)
    return scores
