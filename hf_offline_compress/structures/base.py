"""The interface of all structures, without torch: options, stored tensors and sizes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, TypeAlias

from ..errors import CompressionError
from .storage import Storage, Stored


@dataclass(frozen=True)
class Mixture:
    """A size of a trellis: rows fall into classes, and each has a rate of its own.

    Attributes:
        classes: of each, from the one with the most bits on: step of the rate, and streams.
    """

    classes: tuple[tuple[int, int], ...]


# What a budget decides: a rank, a latent width, a number of bits. A trellis has finer sizes besides.
Size: TypeAlias = int | Mixture


def integer(size: Size) -> int:
    """Return a size of a structure that has integers alone."""
    if isinstance(size, Mixture):
        raise TypeError(f"{size} is a size of a trellis alone.")
    return size


@dataclass(frozen=True)
class GroupShape:
    """The matrices of a group, as far as sizes depend on them.

    Attributes:
        members: how many matrices.
        rows: of each.
        columns: of each.
        heads: how many attention heads the rows of each are cut into; 1 where they are not.
        embedding: whether rows are looked up.
    """

    members: int
    rows: int
    columns: int
    heads: int = 1
    embedding: bool = False

    @property
    def all_rows(self) -> int:
        """Rows of all members together."""
        return self.members * self.rows

    @property
    def parameters(self) -> int:
        """Weights of all members together."""
        return self.all_rows * self.columns


@dataclass(frozen=True)
class Structure(ABC):
    """How a group of weight matrices [rows, columns] is represented.

    A group has one member or more, all of one shape. Each member stores tensors of its own (latents, say); what decodes
    them is stored once for the group. `size` is the one number that a budget decides: a rank, a latent width, a number
    of bits.

    Attributes:
        name: in recipes.
        title: in texts, as a noun.
        reference: where it comes from.
        objectives: what `Objective.terms` may hold.
        unit: what `size` counts.
        minimum: the smallest size.
        shares: whether several members have anything in common to store.
        least_rows: matrices of fewer rows are better left as they are.
        mixes_outputs: whether rows' errors are weighed together, which takes E[g gᵀ] of the gradients at them and not only
            its diagonal.
        known_gains: whether the error at every size is known without solving for it, so that bytes can go where they
            gain most.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    reference: ClassVar[str]
    objectives: ClassVar[tuple[str, ...]]
    unit: ClassVar[str]
    minimum: ClassVar[int] = 1
    shares: ClassVar[bool] = True
    mixes_outputs: ClassVar[bool] = False
    known_gains: ClassVar[bool] = False
    least_rows: ClassVar[int] = 1

    @abstractmethod
    def member_tensors(self, size: Size, shape: GroupShape) -> dict[str, Stored]:
        """Return the tensors that one member stores, by name."""

    def decoder_tensors(self, size: Size, shape: GroupShape) -> dict[str, Stored]:
        """Return the tensors that the members of a group share, by name."""
        return {}

    @abstractmethod
    def runtime(self, size: Size, shape: GroupShape) -> dict[str, Any]:
        """Return what the runtime layer is built from, as plain JSON; its key `structure` names the layer."""

    @abstractmethod
    def limit(self, shape: GroupShape) -> int:
        """Return the size beyond which nothing is gained."""

    def shown(self, size: Size, shape: GroupShape) -> float:
        """Return a size as reports have it, in `unit`."""
        return integer(size)

    @property
    def known_rounding(self) -> bool:
        """Whether it is known without solving what storing in integers adds to errors."""
        return self.known_gains

    def solvable(self) -> tuple[str, ...]:
        """Return the objectives that there are with these options, as `Objective.terms` names them."""
        return self.objectives

    def require(self) -> None:  # noqa: B027 (most structures need nothing)
        """Raise CompressionError if a library that solving needs is not installed."""

    def check(self, shape: GroupShape) -> None:
        """Raise CompressionError where matrices of this shape cannot be represented so, at any size."""
        if shape.members > 1 and not self.shares:
            raise CompressionError(
                f"The structure '{self.name}' has nothing to share between matrices; its grouping is separated."
            )

    def parameters(self, size: Size, shape: GroupShape) -> int:
        """Return how many numbers a group stores; positions and packed integers are none."""
        own = sum(tensor.count for tensor in self.member_tensors(size, shape).values() if tensor.dtype is None)
        shared = sum(tensor.count for tensor in self.decoder_tensors(size, shape).values() if tensor.dtype is None)
        return shape.members * own + shared

    def stored_bytes(self, size: Size, shape: GroupShape, storage: Storage) -> int:
        """Return how many bytes a group stores."""
        own = storage.bytes(self.member_tensors(size, shape))
        return shape.members * own + storage.bytes(self.decoder_tensors(size, shape))

    def fit(self, shape: GroupShape, budget: int, storage: Storage) -> int:
        """Return the largest size that stores at most `budget` bytes; 0 where even the smallest stores more."""
        low, high = self.minimum - 1, self.limit(shape)
        while low < high:
            middle = (low + high + 1) // 2
            if self.stored_bytes(middle, shape, storage) <= budget:
                low = middle
            else:
                high = middle - 1
        return low if low >= self.minimum else 0

    def describe(self) -> dict[str, Any]:
        """Return name and options as plain JSON, as a recipe file has them."""
        return {"name": self.name, **asdict(self)}
