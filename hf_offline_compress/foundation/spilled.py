"""Tensors that are kept in a file until they are needed."""

from __future__ import annotations

import os
import tempfile
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

# Where a tensor lies: its first byte in the file, its shape, and the name of its dtype. All of it is plain, to be kept.
Place = tuple[int, tuple[int, ...], str]


class Spilled(MutableMapping[Any, Tensor]):
    """Key → tensor on the CPU, read anew whenever nobody holds it; who changes what was read changes a copy.

    By default the file has no name where the system can do so (not on Windows): whatever ends the process, nothing of it
    stays. A named file stays, and with the last mark it can be gone on with: what a mark lists is not overwritten before
    the next one.
    """

    def __init__(
        self, folder: Path | None = None, file: Path | None = None, mark: Mapping[Hashable, Place] | None = None
    ) -> None:
        """Begin with nothing, or with what a mark lists.

        Args:
            folder: on whose disk a file without a name lies; by default that of temporary files.
            file: a named one, instead.
            mark: what `mark` returned for that file; None to begin it anew.
        """
        if file is None:
            self._file: Any = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - it is open as long as this is
        else:
            self._file = file.open("w+b" if mark is None else "r+b")
        self._named = file is not None
        self._places: dict[Hashable, Place] = dict(mark or {})
        self._end = max((place[0] + _size(place) for place in self._places.values()), default=0)
        # Where tensors lay that were removed: since the last mark, and before it, by their bytes.
        self._removed: list[Place] = []
        self._free: dict[int, list[int]] = defaultdict(list)
        self._held: WeakValueDictionary[Hashable, Tensor] = WeakValueDictionary()

    def mark(self) -> dict[Hashable, Place]:
        """Return where everything lies, which is on the disk then; the space of what was removed may be used again.

        Whoever means to go on with it keeps it before anything else is written.
        """
        if self._named:
            self._file.flush()
            os.fsync(self._file.fileno())
        for place in self._removed:
            self._free[_size(place)].append(place[0])
        self._removed.clear()
        return dict(self._places)

    def clear(self) -> None:
        """Remove all tensors, marked ones too, and free their disk space."""
        for known in (self._places, self._held, self._removed, self._free):
            known.clear()
        self._file.truncate(0)
        self._end = 0

    def __setitem__(self, key: Hashable, tensor: Tensor) -> None:
        """Write a tensor."""
        own = tensor.detach().cpu().contiguous()
        if key in self:
            del self[key]
        free = self._free[own.nbytes]
        start = free.pop() if free else self._end
        self._file.seek(start)
        self._file.write(own.flatten().view(torch.uint8).numpy())
        self._places[key] = start, tuple(own.shape), str(own.dtype).removeprefix("torch.")
        self._end = max(self._end, start + own.nbytes)

    def __getitem__(self, key: Hashable) -> Tensor:
        """Return a tensor; while it is referenced, all callers get the same object."""
        if (held := self._held.get(key)) is None:
            start, shape, dtype = self._places[key]
            held = torch.empty(shape, dtype=getattr(torch, dtype))
            self._file.seek(start)
            self._file.readinto(held.flatten().view(torch.uint8).numpy())
            self._held[key] = held
        return held

    def __delitem__(self, key: Hashable) -> None:
        """Remove a tensor."""
        self._removed.append(self._places.pop(key))
        self._held.pop(key, None)

    def __contains__(self, key: object) -> bool:
        """Whether there is such a tensor, which is not read."""
        return key in self._places

    def __iter__(self) -> Iterator[Hashable]:
        """Give the keys."""
        return iter(self._places)

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._places)


def _size(place: Place) -> int:
    """Return the bytes of a tensor."""
    _, shape, dtype = place
    return torch.Size(shape).numel() * getattr(torch, dtype).itemsize
