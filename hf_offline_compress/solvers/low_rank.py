"""Low rank in closed form, by an eigenproblem of the smaller side, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Factors, Problem

# Second moments of few texts are singular; this share of their mean diagonal is added.
DAMPING = 1e-4


@torch.no_grad()
def solve_low_rank(problem: Problem) -> Factors:
    """Return the factors of least error ‖D (W − Z B) H^½‖ of the given rank, W the members stacked along rows.

    D² are the row weights and H the input moments; either may be absent. Without D, the answer is the projection onto
    the leading left singular vectors U of W H^½: Z = U and B = Uᵀ W, for which H needs no inverse (DRONE, NeurIPS 2021).
    With D it is Z = W L V and B = Vᵀ L⁻¹, H = L Lᵀ, V the leading right singular vectors of D W L (FWSVD, ICLR 2022, has
    L = I).
    """
    weight = torch.cat([w.double() for w in problem.weights])
    rank = problem.size
    root = None if problem.input_moments is None else damped_root(problem.input_moments.to(weight))
    if problem.row_weights is None:
        latents = _left_vectors(weight if root is None else weight @ root, rank)
        basis = latents.T @ weight
    else:
        shaped = weight if root is None else weight @ root
        scaled = shaped * problem.row_weights.to(shaped).sqrt()[:, None]
        right = _leading(scaled.T @ scaled, rank)
        latents = shaped @ right
        basis = right.T if root is None else torch.linalg.solve_triangular(root, right.T, upper=False, left=False)
    latents, basis = _balanced(latents, basis)
    parts = torch.split(latents, [len(w) for w in problem.weights])
    return Factors(tuple({"latents": part} for part in parts), {"weight": basis.T})


def damped_root(moments: Tensor) -> Tensor:
    """Return L with L Lᵀ = H + damping, lower triangular [columns, columns]."""
    mean = moments.diagonal().mean().clamp_min(torch.finfo(moments.dtype).tiny)
    eye = torch.eye(len(moments), dtype=moments.dtype, device=moments.device)
    for damping in (DAMPING, 1e-2, 1.0):
        root, failed = torch.linalg.cholesky_ex(moments + damping * mean * eye)
        if not failed:
            break
    return root


def _leading(gram: Tensor, rank: int) -> Tensor:
    """Return the leading eigenvectors [n, rank] of a symmetric matrix, the largest first."""
    return torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(1)


def _left_vectors(matrix: Tensor, rank: int) -> Tensor:
    """Return the leading left singular vectors [rows, rank], orthonormal."""
    rows, columns = matrix.shape
    if rows <= columns:
        return _leading(matrix @ matrix.T, rank)
    # M V spans what U does; orthonormalising it needs no division by singular values that may be zero.
    return torch.linalg.qr(matrix @ _leading(matrix.T @ matrix, rank)).Q


def _balanced(latents: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Scale each pair of factors to equal norms, so that narrow storages serve both alike."""
    left, right = latents.norm(dim=0), basis.norm(dim=1)
    scale = torch.where((left > 0) & (right > 0), (right / left).sqrt(), torch.ones_like(left))
    return latents * scale, basis / scale[:, None]
