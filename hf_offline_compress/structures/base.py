"""What every structure says about itself, without torch: its options, what it stores, and how large it may be."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from math import prod
from typing import Any, ClassVar

Shape = tuple[int, ...]
INDEX_DTYPE, INDEX_BYTES = "int16", 2


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
    # Whether the error at every size is known without solving for it, so that bytes can go where they gain most.
    known_gains: ClassVar[bool] = False

    @abstractmethod
    def member_tensors(self, size: int, rows: int, columns: int) -> dict[str, Shape]:
        """Return name and shape of the tensors that one member of `rows` rows stores."""

    @abstractmethod
    def decoder_tensors(self, size: int, columns: int) -> dict[str, Shape]:
        """Return name and shape of the tensors that the members of a group share."""

    def index_tensors(self, size: int, columns: int) -> dict[str, Shape]:
        """Return the tensors of the decoder that hold positions, not values; they are kept as int16."""
        return {}

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

    def stored_bytes(self, size: int, rows: tuple[int, ...], columns: int, itemsize: int) -> int:
        """Return how many bytes a group stores, at `itemsize` bytes a number."""
        indices = sum(prod(shape) for shape in self.index_tensors(size, columns).values())
        return self.parameters(size, rows, columns) * itemsize + indices * INDEX_BYTES

    def fit(self, rows: tuple[int, ...], columns: int, budget: int, itemsize: int) -> int:
        """Return the largest size that stores at most `budget` bytes; 0 where even size 1 stores more."""
        low, high = 0, self.limit(sum(rows), columns)
        while low < high:
            middle = (low + high + 1) // 2
            if self.stored_bytes(middle, rows, columns, itemsize) <= budget:
                low = middle
            else:
                high = middle - 1
        return low

    def describe(self) -> dict[str, Any]:
        """Return name and options as plain JSON, as a recipe file has them."""
        return {"name": self.name, **asdict(self)}
