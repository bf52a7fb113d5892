"""One budget for all groups: sizes at which the next byte reduces the error equally everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Choices:
    """The choices of one group.

    Attributes:
        errors: expected loss of each choice, [choices], not negative.
        costs: bytes of each choice, [choices].
    """

    errors: Tensor
    costs: Tensor


def allocate(groups: Sequence[Choices], budget: float) -> list[int]:
    """Return the index of each group's choice: the least total error with at most `budget` bytes in total.

    At a price λ per byte, the choices minimise error + λ · cost; λ is found by bisection (Everett 1963), and the rest of the
    budget is then spent, step by step, on the largest error reduction per byte.

    Raises:
        ValueError: the cheapest choices together cost more than the budget.
    """
    cheapest = sum(float(group.costs.min()) for group in groups)
    if cheapest > budget:
        raise ValueError(f"The cheapest choices cost {cheapest:.0f} bytes, more than the budget of {budget:.0f}.")

    def at(price: float) -> list[int]:
        return [int((group.errors + price * group.costs).argmin()) for group in groups]

    def cost(chosen: list[int]) -> float:
        return sum(float(group.costs[i]) for group, i in zip(groups, chosen, strict=True))

    low, high = 0.0, 1.0
    while cost(at(high)) > budget:
        high *= 4
    if cost(at(0.0)) <= budget:
        return at(0.0)
    for _ in range(100):
        middle = (low * high) ** 0.5 if low > 0 else high / 1024
        if cost(at(middle)) > budget:
            low = middle
        else:
            high = middle
        if low > 0 and high / low < 1 + 1e-9:
            break
    return _filled(groups, at(high), budget)


def _filled(groups: Sequence[Choices], chosen: list[int], budget: float) -> list[int]:
    """Spend the remaining bytes on single changes with the largest error reduction per byte."""
    chosen = list(chosen)
    left = budget - sum(float(group.costs[i]) for group, i in zip(groups, chosen, strict=True))
    while True:
        best, gain = None, 0.0
        for index, (group, i) in enumerate(zip(groups, chosen, strict=True)):
            more = group.costs - group.costs[i]
            rates = torch.where((more > 0) & (more <= left), (group.errors[i] - group.errors) / more.clamp_min(1), 0.0)
            candidate = int(rates.argmax())
            if float(rates[candidate]) > gain:
                best, gain = (index, candidate), float(rates[candidate])
        if best is None:
            return chosen
        index, candidate = best
        left -= float(groups[index].costs[candidate] - groups[index].costs[chosen[index]])
        chosen[index] = candidate
