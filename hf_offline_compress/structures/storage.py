"""How the numbers of a structure's tensors are kept: in a dtype, or as integers of few bits with scales."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

Shape = tuple[int, ...]
FLOATS = {"float32": 4, "float16": 2, "bfloat16": 2}
INTEGERS = {"int8": 8, "int4": 4, "int3": 3, "int2": 2}
# What is stored in a dtype of its own, whatever the group's storage: positions and packed integers.
ITEM_BYTES = {"int16": 2, "uint8": 1}
# Group size: numbers that share a scale and a zero; smaller tensors are not rounded.
GROUP_SIZE = 64
# What scales a whole row is not rounded to fewer bits than these, nor is anything of one dimension.
DELICATE, DELICATE_BITS = ("scales", "norms"), 8


@dataclass(frozen=True)
class Stored:
    """One stored tensor.

    Attributes:
        shape: its shape.
        dtype: one of `ITEM_BYTES`; None for numbers, which are kept in the group's storage.
    """

    shape: Shape
    dtype: str | None = None

    @property
    def count(self) -> int:
        """Number of entries."""
        return prod(self.shape)


@dataclass(frozen=True)
class Storage:
    """How numbers are kept.

    Attributes:
        dtype: of the numbers; or, of integers, of their scales.
        bits: of integers; None for numbers as they are.
    """

    dtype: str
    bits: int | None = None

    @classmethod
    def named(cls, name: str, dtype: str) -> Storage:
        """Return a storage by the name it has in a recipe; `dtype` is that of scales."""
        return cls(dtype, INTEGERS[name]) if name in INTEGERS else cls(name)

    def __str__(self) -> str:
        """Return the name that a recipe has for it."""
        return f"int{self.bits}" if self.bits else self.dtype

    def integers(self, tensors: Mapping[str, Stored]) -> dict[str, int]:
        """Return which of the tensors are kept as integers, and their bits."""
        if self.bits is None:
            return {}
        chosen = {
            name: tensor for name, tensor in tensors.items() if tensor.dtype is None and tensor.count >= GROUP_SIZE
        }
        return {
            name: max(self.bits, DELICATE_BITS) if len(tensor.shape) < 2 or name in DELICATE else self.bits
            for name, tensor in chosen.items()
        }

    def kept(self, tensors: Mapping[str, Stored]) -> dict[str, Stored]:
        """Return the tensors as they are kept: of rounded ones the codes, the scales and the zeros."""
        integers = self.integers(tensors)
        kept: dict[str, Stored] = {}
        for name, tensor in tensors.items():
            if name not in integers:
                kept[name] = tensor
                continue
            groups, bits = ceil(tensor.count / GROUP_SIZE), integers[name]
            kept[f"{name}_codes"] = Stored((ceil(tensor.count * bits / 8),), "uint8")
            kept[f"{name}_scales"] = Stored((groups,))
            kept[f"{name}_zeros"] = Stored((ceil(groups * (bits + 1) / 8),), "uint8")
        return kept

    def bytes(self, tensors: Mapping[str, Stored]) -> int:
        """Return how many bytes the tensors take."""
        return sum(self._bytes(tensor) for tensor in self.kept(tensors).values())

    def runtime(self, own: Mapping[str, Stored], decoder: Mapping[str, Stored]) -> dict[str, Any]:
        """Return what the runtime layers must know of it, as plain JSON."""
        entry: dict[str, Any] = {"storage": self.dtype}
        if self.bits:
            entry["integers"] = {
                "sharing": GROUP_SIZE,
                "own": self.integers(own),
                "decoder": self.integers(decoder),
            }
        return entry

    def _bytes(self, tensor: Stored) -> int:
        return tensor.count * (ITEM_BYTES[tensor.dtype] if tensor.dtype else FLOATS[self.dtype])
