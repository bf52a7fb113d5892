"""Estimates of the work of groups, by which processes share them."""

from __future__ import annotations

from ..plan.groups import Group
from ..structures import Trellis

# What takes as long as a state of a path: so much of a product with a metric (there are several of a group's rows), and of
# the factorization of one. Measured on a CPU.
PRODUCT, FACTORIZED = 0.22, 0.027


def expected_work(group: Group) -> float:
    """Return about how long a group takes to be solved, in a unit of its own; it compares groups of like structures.

    A path through a trellis asks every state at every step, and its errors are handed on in the metric of the inputs; most
    others are products with a square matrix.
    """
    if isinstance(group.structure, Trellis):
        classes = group.structure.mixture(group.size, group.shape).classes
        codes = [(streams, group.structure.code(step)) for step, streams in classes]
        rows = group.structure.rows_a_stream(group.shape)
        states = sum(
            streams * rows * group.columns / code["width"] * 2.0 ** code["state_bits"] for streams, code in codes
        )
        square = group.columns**2 if group.rule.objective.calibrated else 0
        return states + square * (PRODUCT * group.rows + FACTORIZED * group.columns)
    return float(group.parameters * min(group.rows, group.columns))
