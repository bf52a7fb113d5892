"""Tucker decompositions: started by tensorly (HOSVD, then HOOI), then polished by the loss."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..structures import Tucker
from .base import Factors, Problem
from .low_rank import leading_vectors, solve_low_rank
from .polishing import polish

SWEEPS = 10
TOLERANCE = 1e-4


@torch.no_grad()
def solve_tucker(problem: Problem) -> Factors:
    """Return the mixing of each member, and the core and factors that they share.

    The start is least in L2 (HOOI: De Lathauwer et al. 2000); from there it is trained by the loss, and never made worse.
    """
    structure, shape = problem.structure, problem.shape
    assert isinstance(structure, Tucker)
    if structure.is_matrix(shape):
        return _of_a_matrix(problem, structure.polish)
    blocks, height, columns = structure.sides(shape)
    padded = torch.stack([weight.float() for weight in problem.weights])
    padded = torch.nn.functional.pad(padded, (0, 0, 0, blocks * height - shape.rows))
    tensor = padded.view(shape.members * blocks, height, columns)
    core, factors = _decompose(tensor, structure.ranks(problem.integer_size, shape))

    def decode(values: list[Tensor]) -> Tensor:
        core, mixing, row_factor, column_factor = values
        slices = torch.einsum("br,rst->bst", mixing, core)
        rows = (row_factor @ slices) @ column_factor.T
        return rows.view(shape.members, -1, columns)[:, : shape.rows].flatten(0, 1)

    values = [core, *factors]
    notes: dict[str, float] = {}
    if structure.polish:
        notes["loss"] = polish(problem, values, decode, structure.polish)
    core, mixing, row_factor, column_factor = (value.contiguous() for value in values)
    return Factors(
        tuple({"mixing": part} for part in mixing.split(blocks)),
        {"core": core, "row_factor": row_factor, "column_factor": column_factor},
        notes,
    )


def _of_a_matrix(problem: Problem, steps: int) -> Factors:
    """Return factors of low rank, the closed form in L2, polished where the objective is another."""
    factors = solve_low_rank(replace(problem, row_weights=None))
    if not steps or problem.objective.terms == ("l2",):
        return factors
    latents, weight = factors.members[0]["latents"].float(), factors.decoder["weight"].float()
    reached = polish(problem, [latents, weight], lambda f: f[0] @ f[1].T, steps)
    return Factors(({"latents": latents},), {"weight": weight}, {"loss": reached})


def _decompose(tensor: Tensor, ranks: tuple[int, int, int]) -> tuple[Tensor, list[Tensor]]:
    """Return core and factors of a tensor."""
    import tensorly
    from tensorly.decomposition import tucker

    with tensorly.backend_context("pytorch"):
        core, factors = tucker(
            tensor.double(), rank=list(ranks), n_iter_max=SWEEPS, tol=TOLERANCE, init="svd", svd=_gram_svd
        )
    return core.float(), [factor.float() for factor in factors]


def _gram_svd(matrix: Tensor, n_eigenvecs: int, **_: object) -> tuple[Tensor, Tensor, Tensor]:
    """Return the leading singular triplets of a matrix from the Gram matrix of its smaller side."""
    if matrix.shape[0] > matrix.shape[1]:
        right, values, left = _gram_svd(matrix.T, n_eigenvecs)
        return left.T, values, right.T
    left = leading_vectors(matrix @ matrix.T, n_eigenvecs)
    projected = left.T @ matrix
    values = projected.norm(dim=1)
    return left, values, projected / values.clamp_min(torch.finfo(values.dtype).tiny)[:, None]
