"""Sums of Kronecker products: the SVD of the rearranged matrix, then polished by the loss where that can help."""

from __future__ import annotations

import torch
from torch import Tensor

from ..structures import Kronecker
from .base import Factors, Problem
from .low_rank import leading_vectors
from .polishing import polish

# Entries of A ⊗ B beyond the matrix are free: they are filled in this many times.
FILLINGS = 3


@torch.no_grad()
def solve_kronecker(problem: Problem) -> Factors:
    """Return left factors for each member and the right factors that they share.

    In A ⊗ B, the entries of A stand in the one, those of B in the other side of a matrix of rank 1 (Van Loan & Pitsianis
    1993), so the closest sum in L2 is a truncated SVD. Sides that had to be padded are filled with what the answer itself
    gives there, again and again: the error on the real entries falls each time.
    """
    structure, shape = problem.structure, problem.shape
    assert isinstance(structure, Kronecker)
    left_side, right_side = structure.sides(shape)
    height, width = left_side[0] * right_side[0], left_side[1] * right_side[1]
    cropped = (height, width) != (shape.rows, shape.columns)
    stacked = torch.stack([weight.double() for weight in problem.weights])
    padded = torch.nn.functional.pad(stacked, (0, width - shape.columns, 0, height - shape.rows))
    left, right = _best(padded, problem.integer_size, left_side, right_side)
    for _ in range(FILLINGS if cropped else 0):
        padded = _products(left, right)
        padded[:, : shape.rows, : shape.columns] = stacked
        left, right = _best(padded, problem.integer_size, left_side, right_side)
    left, right = left.float(), right.float()
    notes: dict[str, float] = {}
    plain = problem.objective.terms == ("l2",)
    if structure.polish and (cropped or not plain):
        notes["loss"] = polish(
            problem,
            [left, right],
            lambda f: _products(f[0], f[1])[:, : shape.rows, : shape.columns].flatten(0, 1),
            structure.polish,
        )
    return Factors(tuple({"left": part} for part in left.unbind(1)), {"right": right}, notes)


def _best(padded: Tensor, terms: int, left_side: tuple[int, int], right_side: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return left [terms, members, a, c] and right factors [terms, b, d], closest to padded [members, a · b, c · d]."""
    (a, c), (b, d) = left_side, right_side
    rearranged = padded.view(-1, a, b, c, d).transpose(2, 3).reshape(-1, b * d)
    rows, columns = rearranged.shape
    if rows <= columns:
        vectors = leading_vectors(rearranged @ rearranged.T, terms)
        left, right = vectors, rearranged.T @ vectors
    else:
        vectors = leading_vectors(rearranged.T @ rearranged, terms)
        left, right = rearranged @ vectors, vectors
    # Both factors of a term get the same norm, so that narrow storages serve both alike.
    norms = (left.norm(dim=0) / right.norm(dim=0).clamp_min(1e-300)).sqrt()
    norms = torch.where((norms > 0) & norms.isfinite(), norms, torch.ones_like(norms))
    return (left / norms).T.reshape(terms, -1, a, c), (right * norms).T.reshape(terms, b, d)


def _products(left: Tensor, right: Tensor) -> Tensor:
    """Return Σ A ⊗ B for all members, [members, a · b, c · d]."""
    return torch.einsum("tmac,tbd->mabcd", left, right).flatten(3, 4).flatten(1, 2)
