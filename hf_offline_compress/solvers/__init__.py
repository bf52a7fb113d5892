"""The solvers: matrices in, factors out, one file a structure. They know no models."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .autoencoder import solve_autoencoder
from .base import Factors, Problem
from .low_rank import low_rank_errors, solve_low_rank

SOLVERS: dict[str, Callable[[Problem], Factors]] = {
    "low_rank": solve_low_rank,
    "autoencoder": solve_autoencoder,
}


def solve(problem: Problem) -> Factors:
    """Return the factors of a group, by the solver of its structure."""
    return SOLVERS[problem.structure.name](problem)


# Of structures with `known_gains`: the least error at size 0, 1, 2, ….
ERRORS: dict[str, Callable[[Problem], Tensor]] = {"low_rank": low_rank_errors}


def expected_errors(problem: Problem) -> Tensor:
    """Return the least squared error of a group at every size from 0 on, in the metric of its objective, [sizes]."""
    return ERRORS[problem.structure.name](problem)


__all__ = ["ERRORS", "SOLVERS", "Factors", "Problem", "expected_errors", "solve"]
