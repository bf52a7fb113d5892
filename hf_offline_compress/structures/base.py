"""What every structure says about itself, without torch: its options, what it stores, and how large it may be."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from math import prod
from typing import Any, ClassVar

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Structure(ABC):
    """How a group of weight matrices [rows, columns] is represented.

    A group has one member or more, of the same number of columns. Each member stores tensors of its own (latents, say);
    what decodes them is stored once for the group. `size` is the one number that a budget decides: a rank, a latent
    width.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    reference: ClassVar[str]
    objectives: ClassVar[tuple[str, ...]]

    @abstractmethod
    def member_tensors(self, size: int, rows: int, columns: int) -> dict[str, Shape]:
        """Return name and shape of the tensors that one member of `rows` rows stores."""

    @abstractmethod
    def decoder_tensors(self, size: int, columns: int) -> dict[str, Shape]:
        """Return name and shape of the tensors that the members of a group share."""

    @abstractmethod
    def runtime(self, size: int) -> dict[str, Any]:
        """Return what the runtime layer is built from, as plain JSON; its key `structure` names the layer."""

    def limit(self, rows: int, columns: int) -> int:
        """Return the size beyond which nothing is gained, for a group of `rows` rows in all."""
        return min(rows, columns)

    def parameters(self, size: int, rows: tuple[int, ...], columns: int) -> int:
        """Return how many numbers a group stores whose members have these rows."""
        shapes = [shape for member in rows for shape in self.member_tensors(size, member, columns).values()]
        shapes += self.decoder_tensors(size, columns).values()
        return sum(prod(shape) for shape in shapes)

    def fit(self, rows: tuple[int, ...], columns: int, budget: int) -> int:
        """Return the largest size that stores at most `budget` numbers; 0 where even size 1 stores more."""
        low, high = 0, self.limit(sum(rows), columns)
        while low < high:
            middle = (low + high + 1) // 2
            if self.parameters(middle, rows, columns) <= budget:
                low = middle
            else:
                high = middle - 1
        return low

    def describe(self) -> dict[str, Any]:
        """Return name and options as plain JSON, as a recipe file has them."""
        return {"name": self.name, **asdict(self)}
