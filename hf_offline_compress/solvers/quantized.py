"""Rounding to few bits."""

from __future__ import annotations

import torch

from ..runtime.packing_compressed import round_min_max
from ..structures import Quantized
from .base import Factors, Problem


@torch.no_grad()
def solve_quantized(problem: Problem) -> Factors:
    """Return codes, scales and minima, rounded to nearest between the least and the largest weight of each group."""
    structure = problem.structure
    assert isinstance(structure, Quantized)
    (weight,) = problem.weights
    codes, scales, minima = round_min_max(weight.float(), problem.size, structure.group_size or weight.shape[1])
    return Factors(({"codes": codes, "scales": scales, "minima": minima},), {})
