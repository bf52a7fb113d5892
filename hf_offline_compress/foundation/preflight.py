"""Checks before any work is done: disk space, file sizes, devices."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CompressionError, listing
from .parsing import parse_bytes

if TYPE_CHECKING:
    import torch

# Beside the weights: tokenizer, code, card, report.
BESIDE = 2_000_000
SMALLEST_SHARD = 1_000


def check_room(target: Path, weight_bytes: int, beside: int = 0) -> None:
    """Raise CompressionError if the disk has too little space for a folder.

    Args:
        target: the folder.
        weight_bytes: of its weights.
        beside: bytes of what a run keeps on that disk until the folder is saved.
    """
    free, needed = shutil.disk_usage(existing(target.resolve())).free, weight_bytes + BESIDE + beside
    if free < needed:
        kept = (
            f", {beside / 1e6:,.1f} MB of it for what is kept until it is saved (--resume, --max-memory)"
            if beside
            else ""
        )
        raise CompressionError(
            f"'{target}' needs {needed / 1e6:,.1f} MB{kept}, and its disk has {free / 1e6:,.1f} MB free; free some, or pass "
            "another path."
        )


def shard_bytes(size: str | int) -> int:
    """Return a shard size in bytes.

    Raises:
        CompressionError: it is no size, or so small that every tensor would be a file.
    """
    found = parse_bytes(size)
    if found < SMALLEST_SHARD:
        raise CompressionError(
            f"max_shard_size is {size!r}, which would put every tensor in its own file; give {SMALLEST_SHARD:,} bytes or more, "
            "e.g. 5GB."
        )
    return found


def check_decoding(decoding: str | None) -> None:
    """Raise CompressionError where there is no such way to hold weights."""
    from ..runtime.bounds_compressed import DECODINGS

    if decoding is not None and decoding not in DECODINGS:
        raise CompressionError(f"The decoding {decoding!r} is unknown; known are {listing(DECODINGS)}.")


def found_device(device: str | torch.device | None) -> torch.device:
    """Return the device by its name; the CPU for None.

    Raises:
        CompressionError: there is none of that name, or none that computes.
    """
    import torch

    try:
        found = torch.device("cpu" if device is None else device)
        if found.type == "meta":
            raise RuntimeError("it holds no numbers")
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:  # torch raises all of them
        there = [
            "cpu",
            *(["cuda"] if torch.cuda.is_available() else []),
            *(["mps"] if torch.mps.is_available() else []),
        ]
        raise CompressionError(
            f"There is no device '{device}' here; there is {' and '.join(there)}. Leave --device (device=) out for the CPU."
        ) from error
    return found


def existing(path: Path) -> Path:
    """Return the nearest of a path and its parents that exists."""
    return next(place for place in (path, *path.parents) if place.exists())
