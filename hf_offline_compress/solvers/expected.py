"""The errors to expect of structures at every size, and what storages add to them, without solving.

Rounding to integers leaves a twelfth of the step's square.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..runtime.numbers_compressed import in_order
from ..runtime.packing_compressed import even_steps
from ..structures import LowRank, Quantized, Size, Stored
from ..structures.storage import DELICATE_BITS, GROUP_SIZE, Storage
from .base import Problem
from .feedback import row_importance, undetermined
from .low_rank import leading_factors, low_rank_errors
from .quantized import quantized_errors
from .rounding import shared_steps
from .trellis import trellis_errors

# Of structures with `known_gains`: the least error at sizes from 0 on, with numbers kept as they are.
ERRORS: dict[str, Callable[[Problem], dict[Size, float]]] = {
    "low_rank": low_rank_errors,
    "quantized": quantized_errors,
    "trellis": trellis_errors,
}


@torch.no_grad()
def expected_errors(problem: Problem, storages: Sequence[Storage] = (Storage("float32"),)) -> list[dict[Size, float]]:
    """Return the least squared error of a group, in the metric of its objective, at every size that it may have.

    Size 0, with which nothing is stored, is among them. Where rounding is nothing beside the error itself, it is left out:
    numbers kept as they are, and of a trellis only what is kept apart.

    Args:
        problem: the group.
        storages: how its numbers may be kept; the errors of each are returned.
    """
    structure = problem.structure
    whole = any(storage.bits for storage in storages)
    if whole and isinstance(structure, LowRank) and structure.known_rounding:
        return _rounded_low_rank(problem, storages)
    least = ERRORS[structure.name](problem)
    if not (whole and isinstance(structure, Quantized)):
        return [least] * len(storages)
    added = [_added_to_scales(problem, storage) if storage.bits else 0.0 for storage in storages]
    return [{size: error + more for size, error in least.items()} for more in added]


def _rounded_low_rank(problem: Problem, storages: Sequence[Storage]) -> list[dict[Size, float]]:
    """Return the errors of low rank at each rank, from the factors of the full one.

    An error in one number of the basis counts by what its column leaves undetermined, H as the metric, and by all latents
    of its dimension; one in a latent by what its dimension of the basis is in that metric, and by its row.
    """
    full = problem.structure.limit(problem.shape)
    found = leading_factors(problem, full)
    latents, basis = found.latents, found.basis
    of_latents = found.left.apply(latents).square().sum(dim=0)
    of_basis = (basis if found.root is None else basis @ found.root).square().sum(dim=1)
    zero = of_latents.new_zeros(1)
    missed = torch.cat([zero, (of_latents * of_basis).flip(0).cumsum(0)]).flip(0)
    columns = undetermined(replace(problem, member_moments=None)).to(basis.device)
    # Latents are fitted to the basis as it has become: its errors in its own directions are compensated.
    left = 1 - torch.arange(1, full + 1, device=basis.device, dtype=basis.dtype) / len(columns)
    shapes = {"latents": Stored(tuple(latents.shape)), "weight": Stored(tuple(basis.shape))}
    errors: list[dict[Size, float]] = []
    for storage in storages:
        bits, added = storage.integers(shapes), torch.zeros_like(of_latents)
        if "latents" in bits:
            squares = found.left.row_squares(latents) @ _steps(latents, bits["latents"]).square()
            added += (squares * of_basis).cumsum(0) / 12
        if "weight" in bits:
            squares = columns @ _steps(basis.T, bits["weight"]).square()
            added += (squares * of_latents).cumsum(0) / 12 * left
        errors.append(dict(enumerate((missed + torch.cat([zero, added])).tolist())))
    return errors


def _added_to_scales(problem: Problem, storage: Storage) -> float:
    """Return what rounding the scales of a quantized matrix adds, the same for all bits: scales are spans over steps."""
    structure, (weight,) = problem.structure, problem.weights
    assert isinstance(structure, Quantized)
    weight, columns = weight.double(), undetermined(problem).to(weight.device)
    width = structure.group_size or weight.shape[1]
    parts = torch.nn.functional.pad(weight, (0, -weight.shape[1] % width)).unflatten(1, (-1, width))
    spans, _ = even_steps(parts.amin(dim=2), parts.amax(dim=2), 1)  # one step is all that there is between two values
    if spans.numel() < GROUP_SIZE:
        return 0.0
    away = _steps(spans, max(storage.bits or 0, DELICATE_BITS)).square() / 12
    squares = torch.nn.functional.pad(columns, (0, -len(columns) % width)).view(-1, width) * parts.square()
    # A group of zeros loses nothing, whatever its scale.
    shares = squares.sum(dim=2) / spans.square().clamp_min(torch.finfo(spans.dtype).tiny)
    return float(((shares * away).sum(dim=1) * row_importance(problem).to(shares)).sum())


def _steps(factor: Tensor, bits: int) -> Tensor:
    """Return the distance between the integers that each number of a factor is rounded to, of the same shape."""
    numbers = in_order(factor)
    steps, _ = shared_steps(numbers, bits)
    spread = steps[:, None].expand(-1, GROUP_SIZE).flatten()[: len(numbers)]
    return spread.view(factor.shape[-1], *factor.shape[:-1]).movedim(0, -1)
