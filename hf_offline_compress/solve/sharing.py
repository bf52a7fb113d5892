"""How much work groups are, by which processes share them."""

from __future__ import annotations

from ..plan.groups import Group
from ..structures import Trellis


def expected_work(group: Group) -> float:
    """Return about how long a group takes to be solved, in a unit of its own; it compares groups of like structures.

    A path through a trellis asks every state at every step; most others are products with a square matrix.
    """
    if isinstance(group.structure, Trellis):
        classes = group.structure.mixture(group.size, group.shape).classes
        codes = [(streams, group.structure.code(step)) for step, streams in classes]
        rows = group.structure.rows_a_stream(group.shape)
        return sum(
            streams * rows * group.columns / code["width"] * 2.0 ** code["state_bits"] for streams, code in codes
        )
    return float(group.parameters * min(group.rows, group.columns))
