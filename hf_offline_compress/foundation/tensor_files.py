"""Headers of safetensors files: what tensors are in them, and whether they are whole. Neither torch nor data is read."""

from __future__ import annotations

import json
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..errors import CompressionError

INDEX_FILE = "model.safetensors.index.json"
DTYPES = {"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL"}
LONGEST_HEADER = 100_000_000  # bytes, as the safetensors library has it


def check_weights(folder: Path, advice: str, title: str | None = None) -> None:
    """Raise CompressionError unless a folder has weights, and all its weight files are whole.

    Args:
        folder: of a checkpoint.
        advice: what to do, for the error.
        title: how the error calls the folder; by default its name.
    """
    index, title = folder / INDEX_FILE, title or folder.name
    single = folder / "model.safetensors"  # read rather than the index, as transformers does
    names = _shards(index, title, advice) if index.is_file() and not single.is_file() else [single.name]
    for name in names:
        if not (folder / name).is_file():
            raise CompressionError(f"'{title}' has no weights: there is no file {name} in it. {advice}")
        if problem := damage(folder / name):
            raise CompressionError(f"The {name} of '{title}' {problem}. {advice}")


def damage(file: Path) -> str | None:
    """Return what is wrong with a safetensors file, as the rest of a sentence; None if it is whole."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(64)
        if what := stand_in(start):
            return f"is {what}, not weights: the download went wrong"
        length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else LONGEST_HEADER + 1
        if length > min(size - 8, LONGEST_HEADER):
            return f"is not a safetensors file, or is cut off: it has {size:,} bytes"
        try:
            stream.seek(8)
            header = json.loads(stream.read(length))
            dtypes = {item["dtype"] for name, item in header.items() if name != "__metadata__"}
            spans = _spans(header)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return "has a header that cannot be read"
    if any(one[1] != other[0] for one, other in pairwise([(0, 0), *spans])):
        return "has an invalid header: its tensors overlap or leave gaps"
    if unknown := sorted(map(str, dtypes - DTYPES)):
        return f"contains tensors of the unsupported dtype {unknown[0]}"
    end = 8 + length + (spans[-1][1] if spans else 0)
    if end != size:
        return f"has {size:,} bytes, and its header says {end:,}: it is {'cut off' if size < end else 'longer'}"
    return None if spans else "has no tensors"


def stand_in(start: bytes) -> str | None:
    """Return what a file really is, judged by its first bytes; None where it may be what its name says."""
    begins = start.lstrip(b"\xef\xbb\xbf \r\n\t").lower()
    if begins.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer"
    return "a web page" if begins.startswith((b"<!doctyp", b"<html")) else None


def _spans(header: dict[str, Any]) -> list[tuple[int, int]]:
    """Return where tensors begin and end, in order."""
    return sorted(tuple(map(int, item["data_offsets"])) for name, item in header.items() if name != "__metadata__")  # type: ignore[misc]


def _shards(index: Path, title: str, advice: str) -> list[str]:
    try:
        content = json.loads(index.read_text("utf-8"))
        names = sorted({str(name) for name in content["weight_map"].values()})
        if not names or not isinstance(content["metadata"], dict):  # transformers cannot do without either
            raise ValueError("no weights, or no metadata")
        return names
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CompressionError(f"The {index.name} of '{title}' cannot be read. {advice}") from error
