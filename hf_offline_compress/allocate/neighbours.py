"""Which groups are measured together, so that measuring costs no more than it may.

A group that is measured alone takes a run through all layers behind it, so the work grows with the square of the number of
layers. Groups of one kind in neighbouring layers are alike in what their forecasts are off by: in a model of many layers
they are put into the dense model together, just as many as the work that is allowed asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from ..plan.groups import Group


def neighbours(groups: Sequence[Group], work: Callable[[Sequence[Group]], float], allowed: float) -> list[list[Group]]:
    """Return the groups in sets that are measured at once: each alone, if the work allows it.

    Args:
        groups: those to be measured.
        work: what measuring a set takes.
        allowed: work in all. The fewest sets, one a kind, may take more.
    """
    rows: dict[tuple[object, ...], list[Group]] = {}
    for group in groups:
        first = group.matrices[0]
        alone = () if first.layer is not None else (group.name,)
        rows.setdefault((first.kind, first.in_base, *alone), []).append(group)
    longest = max(map(len, rows.values()), default=1)
    for count in range(longest, 0, -1):  # sets of a kind, at most
        sets = [part for row in rows.values() for part in _even(row, count)]
        if sum(map(work, sets)) <= allowed:
            break
    return sets


def _even(row: list[Group], count: int) -> list[list[Group]]:
    """Return groups of one kind, in the order of their layers, in so many sets of about equal length."""
    row = sorted(row, key=lambda group: group.matrices[0].layer or 0)
    count = min(count, len(row))
    bounds = [round(i * len(row) / count) for i in range(count + 1)]
    return [row[start:end] for start, end in pairwise(bounds)]
