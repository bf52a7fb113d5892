"""Rounding to few bits: to the nearest, or with error feedback in the metric of the layer's inputs (GPTQ)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..runtime.packing_compressed import even_steps, pack
from ..structures import Quantized, Size
from ..structures.quantized import MAX_BITS
from .base import Factors, Problem
from .feedback import DAMPING, feed_back, inverse_roots, metric_of, row_importance, undetermined

# Of a matrix so much is rounded, and packed, at a time, since both take several times as much memory.
COLUMNS_ROUNDED, ROWS_PACKED = 64, 4096
# Of what a group spans: the values may span so much less.
SHRINK = [1 - 0.03 * i for i in range(21)]


@torch.no_grad()
def solve_quantized(problems: Sequence[Problem]) -> list[Factors]:
    """Return codes, scales and zeros of problems of equal shape, bits and options.

    Where the inputs' second moments are known, columns are rounded one after the other, and later ones compensate for
    the errors so far. A group's scale is fixed when its first column is reached, from its values at that time.
    """
    results: dict[int, Factors] = {}
    metrics = [metric_of(problem) for problem in problems]
    for informed in (False, True):  # an embedding's problem may come without moments where a layer's has them
        chosen = [i for i, metric in enumerate(metrics) if (metric is not None) == informed]
        if not chosen:
            continue
        # A single one is not copied: it may be an embedding.
        first, *others = (problems[i].weights[0].float() for i in chosen)
        weights = torch.stack([first, *others]) if others else first[None]
        found = [metric[0] for i in chosen if (metric := metrics[i]) is not None]
        roots = inverse_roots(found, DAMPING, weights.device) if found else None
        results |= dict(zip(chosen, _rounded(weights, roots, problems[0]), strict=True))
    return [results[i] for i in range(len(problems))]


@torch.no_grad()
def quantized_errors(problem: Problem) -> dict[Size, float]:
    """Return the squared error to expect with 0, 1, … bits, in the metric of the objective.

    Rounding to steps leaves a twelfth of their square; with error feedback, of what columns leave undetermined.
    """
    structure, (weight,) = problem.structure, problem.weights
    assert isinstance(structure, Quantized)
    weight, columns = weight.double(), undetermined(problem)
    importance, width = row_importance(problem).to(weight), structure.group_size or weight.shape[1]
    base = torch.zeros((), dtype=torch.float64)
    for start in range(0, weight.shape[1], width):
        part = weight[:, start : start + width]
        span = part.amax(dim=1).clamp_min(0) - part.amin(dim=1).clamp_max(0)
        base += ((span.square() * importance).sum() * columns[start : start + width].sum()).cpu()
    steps = torch.tensor([2.0**bits - 1 for bits in range(1, MAX_BITS + 1)], dtype=torch.float64)
    errors = base / 12 / steps.square()
    return dict(enumerate([4 * float(errors[0]), *errors.tolist()]))


def _rounded(weights: Tensor, roots: Tensor | None, problem: Problem) -> list[Factors]:
    """Return the factors of weights [members, rows, columns], by the first one's bits and options."""
    structure, bits = problem.structure, problem.integer_size
    assert isinstance(structure, Quantized)
    left = weights.mT.clone(memory_format=torch.contiguous_format)  # [members, columns, rows], changed below
    members, columns, rows = left.shape
    width = structure.group_size or columns
    starts = range(0, columns, width)
    codes = torch.empty_like(left, dtype=torch.uint8)
    scales, zeros = left.new_empty(2, members, len(starts), rows)

    def enter(start: int, end: int) -> None:
        """Fix scale and zero of a group; without feedback, its codes too."""
        part, at = left[:, start:end], start // width
        # The cost of an error in a column after later columns have compensated for it.
        cost = None if roots is None else roots.diagonal(dim1=1, dim2=2)[:, start:end, None].square().reciprocal()
        scales[:, at], zeros[:, at] = _grid(part, cost, bits, structure.clip)
        for first in range(start, end, COLUMNS_ROUNDED) if roots is None else ():
            some = slice(first, min(first + COLUMNS_ROUNDED, end))
            codes[:, some] = nearest_codes(left[:, some], scales[:, at, None], zeros[:, at, None], bits)

    def code(column: int, wanted: Tensor) -> Tensor:
        scale, zero = scales[:, column // width], zeros[:, column // width]
        found = nearest_codes(wanted, scale, zero, bits)
        codes[:, column] = found
        return decoded_codes(found, scale, zero)

    if roots is None:
        for start in starts:
            enter(start, min(start + width, columns))
    else:
        feed_back(left, roots, starts, enter, code)
    packed = torch.cat([pack(part, bits) for part in codes.mT.split(ROWS_PACKED, dim=1)], dim=1)
    packed_zeros = pack(zeros.mT, bits + 1)
    return [
        Factors(({"codes": c, "scales": s, "zeros": z},), {})
        for c, s, z in zip(packed, scales.mT, packed_zeros, strict=True)
    ]


def _grid(part: Tensor, cost: Tensor | None, bits: int, clip: bool) -> tuple[Tensor, Tensor]:
    """Return scale and zero, both [members, rows], of a group [members, columns, rows]; `cost` [members, columns, 1]."""
    low, high = part.aminmax(dim=1)
    whole, zeros = even_steps(low, high, bits)
    if not clip:
        return whole, zeros
    best, least = whole, torch.full_like(whole, torch.inf)
    for share in SHRINK:
        scales = whole * share
        error = (
            part
            - decoded_codes(nearest_codes(part, scales[:, None], zeros[:, None], bits), scales[:, None], zeros[:, None])
        ).square()
        total = (error if cost is None else error * cost).sum(dim=1)
        best, least = torch.where(total < least, scales, best), torch.minimum(total, least)
    return best, zeros


def nearest_codes(wanted: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """Return the codes nearest to numbers, with scales and zeros in half steps that broadcast to them."""
    return (wanted / scales + zeros / 2).round_().clamp_(0, 2**bits - 1)


def decoded_codes(codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """Return the numbers that codes stand for."""
    return (codes - zeros / 2) * scales
