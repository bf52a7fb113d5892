"""Sums over the portions of a text, shared among processes; bit-identical for any number of processes.

Each portion is one process' work, and each sum is another's: the process that owns it gets what all have to add, and adds it
in the order of the portions, as one process alone does; numbers in floating point depend on the order in which they are
summed. Of a product xᵀx, the owner gets the rows x: products are formed once, and where the sum lies. That is less to send
than the product wherever a portion has fewer rows than x has columns, as in wide layers, and otherwise more. Once all
portions are done, owners hand their sums to all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..foundation.processes import ALONE, Processes, shared_out
from .statistics import add_gram_

Portion = TypeVar("Portion")


@dataclass(frozen=True)
class _Share:
    """What a portion adds to a sum, without its numbers.

    Attributes:
        name: of the sum.
        shape: of what is added, [rows, columns] of x where it is a product.
        gram: whether it is xᵀx.
    """

    name: str
    shape: tuple[int, ...]
    gram: bool

    @property
    def sum_shape(self) -> tuple[int, ...]:
        """Shape of the sum."""
        return (self.shape[1], self.shape[1]) if self.gram else self.shape


class Sums:
    """Sums of tensors and of numbers, by name.

    Attributes:
        tensors: name → sum, float32. Where several processes share the work, those of others are complete only at the end.
        numbers: name → sum.
    """

    def __init__(self, processes: Processes = ALONE) -> None:
        """Begin with nothing."""
        self.tensors: dict[str, Tensor] = {}
        self.numbers: dict[str, float] = {}
        self._processes = processes
        # Of this portion; where there is one process, nothing waits.
        self._shares: list[tuple[_Share, Tensor]] = []
        self._counted: list[tuple[str, float]] = []
        # Which process adds a sum, and the shape of it; how much each adds.
        self._owners: dict[str, tuple[int, tuple[int, ...]]] = {}
        self._loads = [0.0] * processes.count

    def over(
        self, portions: Sequence[Portion], progress: Callable[[Iterable[Any]], Iterable[Any]] = iter
    ) -> Iterator[tuple[int, Portion]]:
        """Yield this process' portions with their indices; sums are complete after the last one.

        Args:
            portions: the same in every process.
            progress: wraps the iteration, e.g. in a progress bar.
        """
        count = self._processes.count
        for start in progress(range(0, len(portions), count)):
            mine = start + self._processes.index
            if mine < len(portions):
                yield mine, portions[mine]
            if count > 1:
                self._exchange()
        self._hand_out()

    def add(self, name: str, share: Tensor) -> None:
        """Add a tensor to a sum of its shape; it is used up."""
        if self._processes.count > 1:
            self._shares.append((_Share(name, tuple(share.shape), False), share.contiguous()))
        else:
            self._add(name, share)

    def add_gram(self, name: str, x: Tensor) -> None:
        """Add xᵀx [columns, columns] of x [rows, columns]."""
        x = x.contiguous()
        if self._processes.count > 1:  # x may be part of what the model goes on with
            self._shares.append((_Share(name, tuple(x.shape), True), x.detach().clone()))
        else:
            self._add_gram(name, x)

    def count(self, name: str, number: float) -> None:
        """Add a number."""
        if self._processes.count > 1:
            self._counted.append((name, number))
        else:
            self._count(name, number)

    def _add(self, name: str, share: Tensor) -> None:
        if name in self.tensors:
            self.tensors[name] += share
        else:
            self.tensors[name] = share

    def _add_gram(self, name: str, x: Tensor) -> None:
        if name not in self.tensors:
            self.tensors[name] = x.new_zeros(x.shape[1], x.shape[1])
        add_gram_(self.tensors[name], x)

    def _count(self, name: str, number: float) -> None:
        self.numbers[name] = self.numbers.get(name, 0) + number

    def _exchange(self) -> None:
        """Give owners what all have to add, and add what this process owns, in the order of the portions."""
        processes = self._processes
        shares, self._shares = self._shares, []
        counted, self._counted = self._counted, []
        of_all = processes.gather(([share for share, _ in shares], counted))
        self._find_owners([share for told, _ in of_all for share in told])
        sent = [(self._owner(share), tensor) for share, tensor in shares if self._owner(share) != processes.index]
        own = iter([tensor for share, tensor in shares if self._owner(share) == processes.index])
        del shares
        found = [
            (share, source, next(own) if source == processes.index else self._room(share.shape))
            for source, (told, _) in enumerate(of_all)
            for share in told
            if self._owner(share) == processes.index
        ]
        processes.exchange(sent, [(source, tensor) for _, source, tensor in found if source != processes.index])
        for share, _, tensor in found:
            (self._add_gram if share.gram else self._add)(share.name, tensor)
        for _, numbers in of_all:
            for name, number in numbers:
                self._count(name, number)

    def _owner(self, share: _Share) -> int:
        return self._owners[share.name][0]

    def _room(self, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, device=self._processes.device)

    def _find_owners(self, shares: Iterable[_Share]) -> None:
        """Give the sums that are new to processes, the same in each of them: all have been told the same."""
        new = {share.name: share.sum_shape for share in shares if share.name not in self._owners}
        owners = shared_out([prod(shape) for shape in new.values()], self._loads)
        self._owners |= {name: (owner, shape) for (name, shape), owner in zip(new.items(), owners, strict=True)}

    def _hand_out(self) -> None:
        """Give all processes the sums of all."""
        for name, (owner, shape) in self._owners.items():
            if name not in self.tensors:
                self.tensors[name] = self._room(shape)
            self._processes.broadcast_(self.tensors[name], owner)
