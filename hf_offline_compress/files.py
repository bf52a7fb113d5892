"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import CompressionError


def read_json(file: Path) -> dict[str, Any] | None:
    """Return the mapping that a JSON file holds; None where there is no such file, or it holds none."""
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError):
        return None
    return content if isinstance(content, dict) else None


def write_whole(file: Path, text: str) -> None:
    """Write a text beside its place, then rename it."""
    descriptor, name = tempfile.mkstemp(prefix=f".{file.name}.partial-", dir=file.parent)
    partial = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
        _settle(partial)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Give a hidden folder beside `target` to write into; it takes the target's place once that is done without error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    try:
        yield partial
        for path in (partial, *partial.rglob("*")):
            _settle(path)
        _replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_free(target: Path, overwrite: bool, ours: bool, writer: str) -> None:
    """Raise CompressionError unless a folder can be written there: it is not there, empty, or ours to overwrite.

    Args:
        target: the folder.
        overwrite: whether one of ours may be replaced.
        ours: whether what lies there was written by `writer`.
        writer: for the error, e.g. "this package".
    """
    if target.is_file():
        raise CompressionError(f"'{target}' is a file; pass a folder that is not there yet.")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise CompressionError(
            f"The output folder '{target}' is not empty; pass another, or --overwrite (overwrite=True) to replace it."
        )
    if not ours:
        raise CompressionError(
            f"The output folder '{target}' was not written by {writer}, and so is not overwritten; pass another."
        )


def _replace(partial: Path, folder: Path) -> None:
    """Put the finished folder into its place; a folder that was there is gone only once the new one stands."""
    old = folder.with_name(f".{folder.name}.replaced-{os.getpid()}")
    if folder.exists():
        folder.rename(old)
    try:
        partial.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _settle(path: Path) -> None:
    """Give what was temporary, and so private, the permissions that ordinary files and folders have."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
