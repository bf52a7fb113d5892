"""Low rank in closed form, by an eigenproblem of the smaller side, in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..structures import LowRank, Size
from .base import Factors, Problem

# Second moments of few texts are singular; this share of their mean diagonal is added.
DAMPING = 1e-4
# Gradients are noisier than inputs, and fewer.
OUTPUT_DAMPING = 0.1
# Eigenproblems up to this size are as fast on one thread.
ONE_THREAD = 512


@torch.no_grad()
def solve_low_rank(problem: Problem) -> Factors:
    """Return the factors of least error ‖D (W − Z B) L‖ of the given rank, W the members stacked along rows.

    H = L Lᵀ are the input moments, and D Dᵀ the row weights or (block by block) the output moments; either may be absent.
    """
    found = leading_factors(problem, problem.integer_size)
    # Tucker of a single matrix is low rank too.
    if isinstance(problem.structure, LowRank) and problem.structure.identity_block:
        latents, decoder = _with_identity(found.latents, found.basis)
    else:
        latents, decoder = found.latents, {"weight": found.basis.T}
    parts = torch.split(latents, [len(w) for w in problem.weights])
    return Factors(tuple({"latents": part} for part in parts), decoder)


@dataclass(frozen=True)
class LeadingFactors:
    """Factors of low rank, of which the first r dimensions are those of rank r.

    Attributes:
        latents: Z [rows, rank].
        basis: B [rank, columns], of each dimension as large as its latents.
        root: L [columns, columns], or None for the identity.
        left: D.
    """

    latents: Tensor
    basis: Tensor
    root: Tensor | None
    left: LeftMetric


def leading_factors(problem: Problem, rank: int) -> LeadingFactors:
    """Return the factors of `solve_low_rank`, in float64.

    Of M = D W L the leading left or right singular vectors are computed, whichever are fewer:

    - left ones U: Z = D⁻¹ U and B = Uᵀ D W, for which H needs no inverse (DRONE, NeurIPS 2021);
    - right ones V: Z = W L V and B = Vᵀ L⁻¹, for which D needs none (FWSVD, ICLR 2022, has L = I).
    """
    weight = _stacked(problem)
    root = _input_root(problem, weight)
    shaped = weight if root is None else weight @ root
    left = left_metric(problem, weight)
    rows, columns = weight.shape
    if rows <= columns:
        scaled = left.apply(shaped)
        vectors = leading_vectors(scaled @ scaled.T, rank)
        latents, basis = left.solve(vectors), vectors.T @ left.apply(weight)
    else:
        scaled = left.apply(shaped)
        vectors = leading_vectors(scaled.T @ scaled, rank)
        latents = shaped @ vectors
        if left.squares is None:
            # W L V spans what the left vectors do; orthonormalised, it needs the inverse of neither L nor Σ.
            latents = torch.linalg.qr(latents).Q
            basis = latents.T @ weight
        elif root is None:
            basis = vectors.T
        else:
            basis = torch.linalg.solve_triangular(root, vectors.T, upper=False, left=False)
    return LeadingFactors(*_balanced(latents, basis), root, left)


@torch.no_grad()
def low_rank_errors(problem: Problem) -> dict[Size, float]:
    """Return the squared error ‖D (W − Ŵ) L‖² of the best solution at every rank from 0 on."""
    weight = _stacked(problem)
    root = _input_root(problem, weight)
    scaled = left_metric(problem, weight).apply(weight if root is None else weight @ root)
    gram = scaled @ scaled.T if scaled.shape[0] <= scaled.shape[1] else scaled.T @ scaled
    with _few_threads(len(gram)):
        gains = torch.linalg.eigvalsh(gram).clamp_min(
            0
        )  # ascending: sums from the small end are what higher ranks miss
    missed = torch.cat([gains.new_zeros(1), gains.cumsum(0)])
    return dict(enumerate(missed.flip(0).tolist()))


def damped_root(moments: Tensor, damping: float = DAMPING) -> Tensor:
    """Return L with L Lᵀ = H + damping, lower triangular, float64."""
    damped = moments.to(torch.float64, copy=True)
    mean = damped.diagonal().mean().clamp_min(torch.finfo(damped.dtype).tiny)
    for share in (damping, 1e-2, 1.0):
        damped.diagonal().add_(share * mean)  # in place: moments of wide layers are large
        root, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            break
    return root


@dataclass(frozen=True)
class LeftMetric:
    """D, of the rows of all members.

    Attributes:
        apply: rows → D rows.
        solve: rows → D⁻¹ rows.
        squares: of what an error in each row becomes by itself, [rows]; None where D is the identity.
    """

    apply: Callable[[Tensor], Tensor]
    solve: Callable[[Tensor], Tensor]
    squares: Tensor | None = None

    def row_squares(self, rows: Tensor) -> Tensor:
        """Return `squares`, ones for the identity, on the device of the rows."""
        return rows.new_ones(len(rows)) if self.squares is None else self.squares


def left_metric(problem: Problem, weight: Tensor) -> LeftMetric:
    """Return D of a problem, D Dᵀ the row weights or (block by block) the output moments, for rows like `weight`."""
    if problem.output_moments is not None:
        roots = [damped_root(moments.to(weight.device), OUTPUT_DAMPING) for moments in problem.output_moments]
        sizes = [len(root) for root in roots]

        def apply(x: Tensor) -> Tensor:
            return torch.cat([root.T @ part for root, part in zip(roots, x.split(sizes), strict=True)])

        def solve(x: Tensor) -> Tensor:
            parts = zip(roots, x.split(sizes), strict=True)
            return torch.cat([torch.linalg.solve_triangular(root.T, part, upper=True) for root, part in parts])

        return LeftMetric(apply, solve, torch.cat([root.square().sum(dim=1) for root in roots]))
    if problem.row_weights is not None:
        scale = problem.row_weights.to(weight).sqrt()[:, None]
        return LeftMetric(lambda x: x * scale, lambda x: x / scale, scale[:, 0].square())
    return LeftMetric(lambda x: x, lambda x: x)


def _stacked(problem: Problem) -> Tensor:
    return torch.cat([weight.double() for weight in problem.weights])


def _input_root(problem: Problem, weight: Tensor) -> Tensor | None:
    return None if problem.input_moments is None else damped_root(problem.input_moments.to(weight.device))


def leading_vectors(gram: Tensor, rank: int) -> Tensor:
    """Return the leading eigenvectors [n, rank] of a symmetric matrix, the largest first."""
    with _few_threads(len(gram)):
        return torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(1)


@contextmanager
def _few_threads(size: int) -> Iterator[None]:
    """Use one thread for small problems: more gain nothing there, and wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if size <= ONE_THREAD else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _with_identity(latents: Tensor, basis: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return factors of the same product, with an identity in as many columns of the basis as it has rows.

    The columns are the pivots of an LU decomposition of the transposed basis, Bᵀ = P L U, so that no entry of what is
    left of L grows: B[:, order] = Uᵀ L₁ᵀ [1, (L₂ L₁⁻¹)ᵀ].
    """
    rank, columns = basis.shape
    # Pivots of zero, as of a weight of lower rank, do no harm to L.
    packed, pivots, _ = torch.linalg.lu_factor_ex(basis.T)
    order = list(range(columns))
    for i, pivot in enumerate((pivots - 1).tolist()):
        order[i], order[pivot] = order[pivot], order[i]
    first = packed[:rank].tril(-1) + torch.eye(rank, dtype=basis.dtype, device=basis.device)
    weight = torch.linalg.solve_triangular(first, packed[rank:], upper=False, left=False, unitriangular=True)
    indices = torch.tensor(order, device=basis.device)
    return latents @ basis[:, indices[:rank]], {"weight": weight, "order": indices.to(torch.int16)}


def _balanced(latents: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Scale each pair of factors to equal norms, so that narrow storages serve both alike."""
    left, right = latents.norm(dim=0), basis.norm(dim=1)
    scale = torch.where((left > 0) & (right > 0), (right / left).sqrt(), torch.ones_like(left))
    return latents * scale, basis / scale[:, None]
