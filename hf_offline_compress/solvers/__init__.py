"""The solvers: matrices in, factors out, one file a structure. They know no models."""

from __future__ import annotations

from collections.abc import Callable

from .autoencoder import solve_autoencoder
from .base import Factors, Problem
from .low_rank import solve_low_rank

SOLVERS: dict[str, Callable[[Problem], Factors]] = {
    "low_rank": solve_low_rank,
    "autoencoder": solve_autoencoder,
}


def solve(problem: Problem) -> Factors:
    """Return the factors of a group, by the solver of its structure."""
    return SOLVERS[problem.structure.name](problem)


__all__ = ["SOLVERS", "Factors", "Problem", "solve"]
