"""The solvers: matrices in, factors out, one file a structure. They know no models."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..structures import Size
from .autoencoder import solve_autoencoders
from .base import Factors, Problem
from .codebook import solve_codebook
from .kronecker import solve_kronecker
from .low_rank import low_rank_errors, solve_low_rank
from .quantized import quantized_errors, solve_quantized
from .rounding import rounded_to_integers
from .sparse import solve_sparse
from .trellis import solve_trellises, trellis_errors
from .tucker import solve_tucker

SOLVERS: dict[str, Callable[[Problem], Factors]] = {
    "low_rank": solve_low_rank,
    "kronecker": solve_kronecker,
    "tucker": solve_tucker,
    "sparse": solve_sparse,
    "codebook": solve_codebook,
}
# Of structures whose problems are best solved together, if they are of equal shape, objective and options; and of equal
# size, but for these.
ANY_SIZES = ("trellis",)
BATCHED_SOLVERS: dict[str, Callable[[Sequence[Problem]], list[Factors]]] = {
    "autoencoder": solve_autoencoders,
    "quantized": solve_quantized,
    "trellis": solve_trellises,
}


def solve(problem: Problem) -> Factors:
    """Return the factors of a group, by the solver of its structure."""
    return solve_all([problem])[0]


def solve_all(problems: Sequence[Problem]) -> list[Factors]:
    """Return the factors of groups of one structure; if it is batched, of what `BATCHED_SOLVERS` says."""
    name = problems[0].structure.name
    if name in BATCHED_SOLVERS:
        return BATCHED_SOLVERS[name](problems)
    return [SOLVERS[name](problem) for problem in problems]


# Of structures with `known_gains`: the least error at sizes from 0 on.
ERRORS: dict[str, Callable[[Problem], dict[Size, float]]] = {
    "low_rank": low_rank_errors,
    "quantized": quantized_errors,
    "trellis": trellis_errors,
}


def expected_errors(problem: Problem) -> dict[Size, float]:
    """Return the least squared error of a group, in the metric of its objective, at every size that it may have.

    Size 0, with which nothing is stored, is among them.
    """
    return ERRORS[problem.structure.name](problem)


__all__ = [
    "ANY_SIZES",
    "BATCHED_SOLVERS",
    "ERRORS",
    "SOLVERS",
    "Factors",
    "Problem",
    "expected_errors",
    "rounded_to_integers",
    "solve",
    "solve_all",
]
