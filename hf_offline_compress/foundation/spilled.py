"""Tensors that are kept in a file until they are needed."""

from __future__ import annotations

import tempfile
from collections.abc import Hashable, Iterator, MutableMapping
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor


class Spilled(MutableMapping[Any, Tensor]):
    """Key → tensor on the CPU, read anew whenever nobody holds it; who changes what was read changes a copy.

    The file has no name where the system can do so (not on Windows): whatever ends the process, nothing of it stays.
    """

    def __init__(self, folder: Path | None = None) -> None:
        """Begin with nothing.

        Args:
            folder: on whose disk the file lies; by default that of temporary files.
        """
        self._file: Any = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - it is open as long as this is
        self._places: dict[Hashable, tuple[int, torch.Size, torch.dtype]] = {}
        self._end = 0
        self._held: WeakValueDictionary[Hashable, Tensor] = WeakValueDictionary()

    def __setitem__(self, key: Hashable, tensor: Tensor) -> None:
        """Write a tensor."""
        own = tensor.detach().cpu().contiguous()
        self._file.seek(self._end)
        self._file.write(own.flatten().view(torch.uint8).numpy())
        self._places[key] = self._end, own.shape, own.dtype
        self._end += own.nbytes
        self._held.pop(key, None)

    def __getitem__(self, key: Hashable) -> Tensor:
        """Return a tensor; while it is referenced, all callers get the same object."""
        if (held := self._held.get(key)) is None:
            start, shape, dtype = self._places[key]
            held = torch.empty(shape, dtype=dtype)
            self._file.seek(start)
            self._file.readinto(held.flatten().view(torch.uint8).numpy())
            self._held[key] = held
        return held

    def __delitem__(self, key: Hashable) -> None:
        """Remove a tensor; its space in the file is not reused."""
        del self._places[key]
        self._held.pop(key, None)

    def __iter__(self) -> Iterator[Hashable]:
        """Give the keys."""
        return iter(self._places)

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._places)
