"""Error feedback in the metric of a layer's inputs: what codebooks, quantization and trellises have in common.

In the metric H = E[x xᵀ], an error in one column can be compensated by the columns that are still to be coded (GPTQ: Frantar
et al., ICLR 2023). With H⁻¹ = Uᵀ U, U upper triangular, an error e in column j costs (e / U_jj)², and the columns k > j
absorb it by subtracting e U_jk / U_jj.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .base import Problem

# As GPTQ has it: of the mean of the diagonal.
DAMPING = 1e-2
# Lazy-update block size: columns coded before the remaining columns are updated.
BLOCK = 128
# Columns of the smallest halves.
ONE_BY_ONE = 8
# Triangular matrices of so many columns are inverted at once, wider ones by halves.
INVERTED_AT_ONCE = 256


def metric_of(problem: Problem) -> tuple[Tensor, ...] | None:
    """Return H of each member [columns, columns], one tensor where members share it; None where all errors count equally."""
    if problem.member_moments is not None:
        return problem.member_moments
    if problem.input_moments is not None:
        return (problem.input_moments,) * len(problem.weights)
    return None


def row_importance(problem: Problem) -> Tensor:
    """Return the weight of each row's squared error [all rows], in the objective's own unit."""
    return torch.ones(problem.shape.all_rows) if problem.row_weights is None else problem.row_weights


def undetermined(problem: Problem) -> Tensor:
    """Return how much of each column's square the columns before it leave undetermined, [columns], float64, unscaled.

    That is 1 / U_jj², what a squared error in it costs after later columns have absorbed what they can. For a group
    of one member. Where all columns count equally, all are 1.
    """
    found = metric_of(problem)
    if found is None:
        return torch.ones(problem.shape.columns, dtype=torch.float64)
    mean = found[0].diagonal().double().mean()
    left = _upper_root(damped_moments(found[0], DAMPING, problem.weights[0].device)).diagonal().square()
    return left * mean.to(left.device)


def damped_moments(moments: Tensor, damping: float, device: torch.device | str) -> Tensor:
    """Return moments [columns, columns] over the mean of their diagonal, plus `damping` on the diagonal, in float64."""
    damped = moments.to(device, torch.float64, copy=True)
    damped /= damped.diagonal().mean().clamp_min(1e-30)
    damped.diagonal().add_(damping)
    return damped


def inverse_roots(moments: Sequence[Tensor], damping: float, device: torch.device | str) -> Tensor:
    """Return for each of `moments` [columns, columns] the upper triangular U with H⁻¹ = Uᵀ U, H as `damped_moments` has it.

    Each tensor is factorized once, however often it is given (query, key and value share their inputs).

    Args:
        moments: E[x xᵀ] of each member.
        damping: added to the diagonal, in parts of its mean.
        device: where to compute.

    Returns:
        The roots [members, columns, columns] in float32.
    """
    found: dict[int, Tensor] = {}
    for given in moments:
        if id(given) not in found:
            found[id(given)] = _inverse_root(damped_moments(given, damping, device))
    return torch.stack([found[id(given)] for given in moments])


def _upper_root(damped: Tensor) -> Tensor:
    """Return the upper triangular R with H = R Rᵀ of a positive definite H: a Cholesky factor from the last column on."""
    return torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)


def _inverse_root(damped: Tensor) -> Tensor:
    """Return U of a positive definite H in float64: U = R⁻¹."""
    return _inverted(_upper_root(damped).float())


def _inverted(upper: Tensor) -> Tensor:
    """Return the inverse of an upper triangular matrix; by halves, a third of the work of solving for the unit matrix."""
    columns, middle = len(upper), len(upper) // 2
    if columns <= INVERTED_AT_ONCE:
        unit = torch.eye(columns, dtype=upper.dtype, device=upper.device)
        return torch.linalg.solve_triangular(upper, unit, upper=True)
    inverse = torch.zeros_like(upper)
    inverse[:middle, :middle] = first = _inverted(upper[:middle, :middle])
    inverse[middle:, middle:] = second = _inverted(upper[middle:, middle:])
    inverse[:middle, middle:] = (first @ upper[:middle, middle:]).neg_() @ second
    return inverse


def feed_back(
    left: Tensor,
    roots: Tensor,
    starts: Sequence[int],
    enter: Callable[[int, int], None],
    code: Callable[[int, Tensor], Tensor],
) -> None:
    """Code the columns from first to last, each compensating for the errors of those before it.

    Errors are passed on by halves: within a half at once, to the other half when it is done, in one product. So a part of the
    columns is up to date when it is entered, and nearly all work is matrix products.

    Args:
        left: the weights, columns before rows [members, columns, rows]; changed: each column becomes what was to be coded.
        roots: of `inverse_roots` [members, columns, columns].
        starts: first columns of the parts, 0 the first of them.
        enter: called with first column and end of a part when `left` is up to date there, before it is coded.
        code: column and its target [members, rows] → what it is coded as, of the same shape.
    """
    ends = [*starts[1:], left.shape[1]]
    errors = torch.empty_like(left)

    def hand_on(start: int, middle: int, end: int) -> None:
        left[:, middle:end].baddbmm_(roots[:, start:middle, middle:end].mT, errors[:, start:middle], alpha=-1)

    def visit_parts(first: int, last: int) -> None:
        if last - first == 1:
            enter(starts[first], ends[first])
            visit(starts[first], ends[first])
            return
        middle = (first + last) // 2
        visit_parts(first, middle)
        hand_on(starts[first], starts[middle], ends[last - 1])
        visit_parts(middle, last)

    def visit(start: int, end: int) -> None:
        if end - start > ONE_BY_ONE:
            middle = (start + end) // 2
            visit(start, middle)
            hand_on(start, middle, end)
            visit(middle, end)
            return
        for column in range(start, end):
            wanted = left[:, column]
            torch.div(wanted - code(column, wanted), roots[:, column, column, None], out=errors[:, column])
            if column + 1 < end:
                hand_on(column, column + 1, end)

    visit_parts(0, len(starts))
