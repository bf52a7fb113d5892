"""Sums over the portions of a text, shared among processes; bit-identical for any number of processes.

Each portion is one process' work. What it adds is handed to all processes, and added there in the order of the portions,
as one process alone adds it: numbers in floating point depend on the order in which they are summed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..foundation.processes import ALONE, Processes
from .statistics import add_gram_

Portion = TypeVar("Portion")


class Sums:
    """Sums of tensors and of numbers, by name.

    Attributes:
        tensors: name → sum, float32.
        numbers: name → sum.
    """

    def __init__(self, processes: Processes = ALONE) -> None:
        """Begin with nothing."""
        self.tensors: dict[str, Tensor] = {}
        self.numbers: dict[str, float] = {}
        self._processes = processes
        self._added: list[tuple[str, Tensor | float]] = []  # in this portion; where there is one process, nothing waits

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

    def add(self, name: str, share: Tensor) -> None:
        """Add a tensor to a sum of its shape; it is used up."""
        if self._processes.count > 1:
            self._added.append((name, share))
        elif name in self.tensors:
            self.tensors[name] += share
        else:
            self.tensors[name] = share

    def add_gram(self, name: str, x: Tensor) -> None:
        """Add xᵀx [columns, columns] of x [rows, columns]."""
        columns = x.shape[1]
        if self._processes.count > 1:
            total = x.new_zeros(columns, columns)
            self._added.append((name, total))
        else:  # where the sum lies, since it is large
            if name not in self.tensors:
                self.tensors[name] = x.new_zeros(columns, columns)
            total = self.tensors[name]
        add_gram_(total, x)

    def count(self, name: str, number: float) -> None:
        """Add a number."""
        if self._processes.count > 1:
            self._added.append((name, number))
        else:
            self.numbers[name] = self.numbers.get(name, 0) + number

    def _exchange(self) -> None:
        """Add the results of all processes, in the order of the portions."""
        added, self._added = self._added, []
        device = self._processes.device
        told = [(name, tuple(each.shape) if isinstance(each, Tensor) else each) for name, each in added]
        for source, entries in enumerate(self._processes.gather(told)):
            own = source == self._processes.index
            for i, (name, entry) in enumerate(entries):
                if not isinstance(entry, tuple):
                    self.numbers[name] = self.numbers.get(name, 0) + entry
                    continue
                share = added[i][1] if own else torch.empty(entry, device=device)
                assert isinstance(share, Tensor)
                share = share.contiguous()
                self._processes.broadcast_(share, source)
                if name in self.tensors:
                    self.tensors[name] += share
                else:
                    self.tensors[name] = share
