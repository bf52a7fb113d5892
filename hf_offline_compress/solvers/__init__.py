"""The solvers: matrices in, factors out, one file a structure. They know no models."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .autoencoder import solve_autoencoders
from .base import Factors, Problem
from .codebook import solve_codebook
from .expected import ERRORS, expected_errors
from .kronecker import solve_kronecker
from .low_rank import solve_low_rank
from .quantized import solve_quantized
from .rounding import rounded_to_integers
from .sparse import solve_sparse
from .trellis import solve_trellises
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
