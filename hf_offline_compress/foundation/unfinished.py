"""Results of an unfinished run, kept in a folder beside its target, so that it can be resumed after any interruption.

`OUT.partial` holds `run.json`, which says what all that is kept depends on, and a file for each result. A file appears
whole or not at all, and what is read from it is tensors and plain values: nothing in it is executed. Tensors that are too
many to be written at once lie in files beside (`spilled`), with marks of them among the results.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from ..errors import CompressionError, listing
from .files import read_json
from .kept_values import load_value, save_value

RUN_FILE, LOCK_FILE = "run.json", "lock"
FORMAT = "hf_offline_compress unfinished run 2"
# The beginning of a long name: with all of it and an ending, it would be too long for a file system.
LETTERS = 60
Result = TypeVar("Result")


def place_of_unfinished(target: Path) -> Path:
    """Return the folder in which a run that writes `target` keeps what it has worked out; a link is followed."""
    place = target.resolve()
    return place.with_name(f"{place.name[:LETTERS]}.partial")


def leftover_of(target: Path) -> Path | None:
    """Return the folder that a resumable run for `target` has left; None where there is none of ours."""
    folder = place_of_unfinished(target)
    return folder if (read_json(folder / RUN_FILE) or {}).get("format") == FORMAT else None


class UnfinishedRun:
    """A run that keeps its results. It must be opened before anything is asked of it."""

    def __init__(self, target: Path) -> None:
        """Take the place beside the target; nothing is written yet."""
        self.folder = place_of_unfinished(target)
        self._lock: Any = None

    def open(self, facts: Mapping[str, Any]) -> None:
        """Make the folder, or go on with the one that is there.

        Args:
            facts: all that the results depend on, as plain JSON, by names that an error can list.

        Raises:
            CompressionError: what lies there is of a run with other facts, or none of ours; or that run is still going on.
        """
        file = self.folder / RUN_FILE
        facts = json.loads(json.dumps(facts))
        if os.path.lexists(self.folder):
            found = read_json(file)
            if not found and self.folder.is_dir() and not any(self.folder.iterdir()):
                found = None  # cut before its first file
            elif not found or found.get("format") != FORMAT:
                raise CompressionError(
                    f"'{self.folder.name}' beside the output folder, where an unfinished run would be kept, holds something "
                    "else; move it away, or pass another output folder."
                )
            else:
                self._check(found.get("facts", {}), facts)
        else:
            found = None
        self.folder.mkdir(parents=True, exist_ok=True)
        if found is None:
            self._write(RUN_FILE, lambda file: file.write_bytes(_json({"format": FORMAT, "facts": facts})))
        self._take()
        for rest in self.folder.glob(".*"):  # files that were not finished
            rest.unlink(missing_ok=True)

    def get(self, name: str, classes: Iterable[type] = ()) -> Any:
        """Return a result by its name; None where it is not there.

        Args:
            name: of the result.
            classes: what may be in it besides tensors and plain values.
        """
        file = self.folder / f"{name}.safetensors"
        return load_value(file, classes) if file.is_file() else None

    def put(self, name: str, value: Any) -> None:
        """Keep a result: tensors, plain values, and dataclasses of them."""
        self._write(f"{name}.safetensors", lambda file: save_value(file, value))

    def remove(self) -> None:
        """Remove everything: the run is finished."""
        self._lock = None
        remove_unfinished(self.folder)

    def _check(self, found: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        other = [name for name in {**facts, **found} if found.get(name) != facts.get(name)]
        if other:
            raise CompressionError(
                f"'{self.folder.name}' holds an unfinished run with another {listing(other)}, so this one would give other "
                "bytes and cannot resume it; restore its conditions, or delete that folder to start over."
            )

    def _take(self) -> None:
        """Lock the run while this process lives; an interrupted process leaves no lock."""
        with suppress(ImportError):  # not on Windows
            import fcntl

            self._lock = (self.folder / LOCK_FILE).open("wb")
            try:
                fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise CompressionError(
                    f"The run kept in '{self.folder.name}' is still running in another process; wait for it, or end it."
                ) from error

    def _write(self, name: str, write: Callable[[Path], object]) -> None:
        partial = self.folder / f".{name}"
        write(partial)
        with partial.open("rb+") as stream:
            os.fsync(stream.fileno())  # or a cut of power could leave the name without the content
        partial.replace(self.folder / name)


def remembered(
    run: UnfinishedRun | None, name: str, work: Callable[[], Result], classes: Iterable[type] = ()
) -> Result:
    """Return a result that a run has kept, or work it out and keep it; without a run, only work it out."""
    if run is None:
        return work()
    found = run.get(name, classes)
    if found is None:
        found = work()
        run.put(name, found)
    return found


def remove_unfinished(folder: Path) -> None:
    """Remove what a run has kept; the file that identifies the run goes last, so that an interruption leaves no unknown files."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name != RUN_FILE:
            path.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def digest(*parts: Any) -> str:
    """Return a hash of tensors, texts, and sequences and mappings of them; of anything else by its `repr`."""
    found = hashlib.sha256()
    _add(found, parts)
    return found.hexdigest()


def _add(found: Any, part: Any) -> None:
    import torch

    if isinstance(part, torch.Tensor):
        flat = part.detach().cpu().contiguous().flatten()
        found.update(f"{part.dtype}{tuple(part.shape)}".encode())
        found.update(flat.view(torch.uint8).numpy())
    elif isinstance(part, Mapping):
        found.update(f"{{{len(part)}".encode())
        for key in sorted(part):  # one value at a time: each may have to be read
            _add(found, (key, part[key]))
    elif isinstance(part, list | tuple):
        found.update(f"[{len(part)}".encode())
        for each in part:
            _add(found, each)
    else:
        text = repr(part).encode()
        found.update(f"{len(text)}:".encode())
        found.update(text)


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
