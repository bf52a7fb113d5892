"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import CompressionError

NODES = {
    stat.S_IFREG: "a file",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def read_json(file: Path) -> dict[str, Any] | None:
    """Return the mapping that a JSON file holds; None where there is no such file, or it holds none."""
    if not file.is_file():  # reading a pipe would wait for ever
        return None
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def belongs_to(folder: Path, path: Path) -> bool:
    """Whether a path, links followed, lies in a folder, or in the blobs of its repository in the Hub's cache.

    A folder that somebody else has made may link to anything on this disk; what it links to is not its content.
    """
    root, place = folder.resolve(), path.resolve()
    blobs = root.parent.parent / "blobs"
    return place.is_relative_to(root) or (root.parent.name == "snapshots" and place.parent == blobs)


def write_whole(file: Path, text: str) -> None:
    """Write a text beside its place, then rename it.

    Raises:
        CompressionError: the disk is full.
    """
    with whole_file(file) as stream:
        stream.write(text.encode("utf-8"))


@contextmanager
def whole_file(file: Path) -> Iterator[BinaryIO]:
    """Give a hidden file beside `file` to write into; it takes that place once that is done without error.

    Raises:
        CompressionError: the disk is full, or the folder may not be written to. Nothing is left then.
    """
    with _space_for(file):
        try:
            descriptor, name = tempfile.mkstemp(prefix=f".{file.name[:40]}.partial-", dir=file.parent)
        except PermissionError as error:
            raise CompressionError(f"'{file}' cannot be written: its folder may not be written to.") from error
        partial = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                yield stream
            _settle(partial)
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(
    target: Path,
    is_ours: Callable[[Path], bool] | None = None,
    keep: Callable[[Path, Path], None] | None = None,
) -> Iterator[Path]:
    """Give a hidden folder beside `target` to write into; it takes the target's place once that is done without error.

    Args:
        target: nothing yet, an empty folder, or one to replace; a link to a folder is followed.
        is_ours: whether a folder may be replaced; by default none may be.
        keep: called with the folder that will be replaced and the finished one, to carry over what should stay.

    Raises:
        CompressionError: the disk is full, or something has come to lie there meanwhile. Nothing is left then.
    """
    place = target.resolve()
    made = [folder for folder in place.parents if not folder.exists()]
    place.parent.mkdir(parents=True, exist_ok=True)
    # The beginning of the name: with all of it, a long one would be too long.
    partial = Path(tempfile.mkdtemp(prefix=f".{place.name[:40]}.partial-", dir=place.parent))
    try:
        with _space_for(target):
            yield partial
            for path in (partial, *partial.rglob("*")):
                _settle(path)
            if keep is not None and is_ours is not None and place.is_dir() and is_ours(place):
                keep(place, partial)
        _put(partial, place, is_ours)
    except BaseException:
        _remove(partial)
        for folder in made:
            with suppress(OSError):  # another run may use it by now
                folder.rmdir()
        raise


def check_target(
    target: Path,
    overwrite: bool,
    is_ours: Callable[[Path], bool],
    writer: str,
    inputs: Iterable[str | Path] = (),
) -> None:
    """Raise CompressionError unless a folder can be written there: it is not there, empty, or ours to overwrite.

    Args:
        target: the folder; a link to one is followed.
        overwrite: whether one of ours may be replaced.
        is_ours: whether a folder was written by `writer`.
        writer: for the error, e.g. "this package".
        inputs: folders that are read for it, which must not lie in it; what is no folder is passed over.
    """
    try:
        place = target.resolve()
        kind = stat.S_IFMT(place.stat().st_mode) if os.path.lexists(place) else None
        linked = os.path.lexists(target) and not target.exists()
    except (OSError, ValueError, RuntimeError) as error:  # names that are too long, loops of links, closed folders
        reason = getattr(error, "strerror", None) or str(error)
        raise CompressionError(f"The output folder '{target}' cannot be written: {reason}; pass another.") from error
    if kind in NODES:
        raise CompressionError(f"The output folder '{target}' is {NODES[kind]}; pass a folder that does not exist yet.")
    if linked:
        raise CompressionError(f"The output folder '{target}' is a broken link; remove it, or pass another.")
    _check_path(target, place)
    for source in map(Path, inputs):
        if source.is_dir() and place in (source.resolve(), *source.resolve().parents):
            raise CompressionError(
                f"'{source}' is, or lies in, the output folder '{target}', which would be replaced; pass another output folder."
            )
    _check_parent(target, place)
    if kind is None:
        return
    try:
        empty = not any(place.iterdir())
    except OSError as error:
        raise CompressionError(f"The output folder '{target}' cannot be read; pass another.") from error
    if not empty and not overwrite:
        raise CompressionError(
            f"The output folder '{target}' is not empty; pass another, or --overwrite (overwrite=True) to replace it."
        )
    if not empty and not is_ours(place):
        raise CompressionError(
            f"The output folder '{target}' was not written by {writer}, and so is not overwritten; pass another."
        )
    if place.is_mount() or place == Path.cwd():
        what = "a mount point" if place.is_mount() else "the current folder"
        raise CompressionError(
            f"The output folder '{target}' is {what}, which cannot be replaced; pass a folder in it."
        )


def _check_path(target: Path, place: Path) -> None:
    """Raise CompressionError if what is written could not be found again by the path as it was given.

    Args:
        target: as it was given.
        place: where that leads to.
    """
    try:
        str(place).encode()
    except UnicodeEncodeError as error:  # safetensors and JSON take no others
        raise CompressionError(
            f"The path of the output folder '{target}' is not valid UTF-8; rename what is not, or pass another."
        ) from error
    passed = [folder.parent for folder in (target, *target.parents) if folder.name == ".."]
    if missing := [folder for folder in passed if not folder.exists()]:
        raise CompressionError(
            f"The output folder '{target}' leads through '{missing[-1]}', which does not exist; pass it without '..'."
        )


def _check_parent(target: Path, place: Path) -> None:
    """Raise CompressionError unless a folder can be made beside the target."""
    parent = next(folder for folder in place.parents if os.path.lexists(folder))
    if not parent.is_dir():
        raise CompressionError(
            f"The output folder '{target}' cannot be created: '{parent}' is not a folder; pass another."
        )
    if not os.access(parent, os.W_OK | os.X_OK):
        raise CompressionError(
            f"The output folder '{target}' cannot be created: you may not write to '{parent}'; pass another."
        )
    limit = os.pathconf(parent, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
    for name in place.relative_to(parent).parts:
        if len(os.fsencode(name)) > limit:
            raise CompressionError(
                f"The output folder's name '{name[:40]}…' is too long: {len(os.fsencode(name))} bytes, where {limit} are allowed."
            )


def keep_others(old: Path, new: Path, is_ours: Callable[[str], bool]) -> None:
    """Carry over the files of a folder that are not ours into the one that replaces it, as hard links where possible.

    Args:
        old: the folder that will be replaced.
        new: the finished one; what is there by the same name stays.
        is_ours: whether a file was written by us, by its name within the folder, with slashes.
    """
    for path in sorted(old.rglob("*")):
        name = path.relative_to(old)
        target = new / name
        if (path.is_dir() and not path.is_symlink()) or os.path.lexists(target) or is_ours(name.as_posix()):
            continue
        for parent in reversed(name.parents[:-1]):
            if not (new / parent).is_dir():
                (new / parent).mkdir()
                shutil.copystat(old / parent, new / parent)
        try:
            os.link(path, target, follow_symlinks=False)
        except OSError:  # some file systems have none
            shutil.copy2(path, target, follow_symlinks=False)


def _put(partial: Path, place: Path, is_ours: Callable[[Path], bool] | None) -> None:
    """Put the finished folder into its place; a folder that was there is gone only once the new one stands.

    A folder is renamed onto nothing, or onto an empty folder, or not at all: so what has come to lie there meanwhile
    stays, whoever has made it.
    """
    with suppress(OSError):
        place.rmdir()  # an empty one only; elsewhere than on POSIX none may be there
    try:
        partial.rename(place)
    except OSError as error:
        if error.errno in NO_SPACE or not os.path.lexists(place):
            raise
        if is_ours is None or not place.is_dir():
            raise _taken(place) from error
    else:
        return
    old = Path(tempfile.mkdtemp(prefix=f".{place.name[:40]}.replaced-", dir=place.parent))
    try:
        old.rmdir()
        place.rename(old)
        if not is_ours(old):
            raise _taken(place)
        partial.rename(place)
    except BaseException:
        if old.exists() and not place.exists():
            old.rename(place)
        raise
    _remove(old)


def _taken(place: Path) -> CompressionError:
    return CompressionError(
        f"Another process created the output folder '{place.name}' meanwhile; it was left as it is and nothing was "
        "written. Pass another output folder."
    )


@contextmanager
def _space_for(target: Path) -> Iterator[None]:
    """Say in one sentence that the disk is full."""
    try:
        yield
    except Exception as error:
        if not is_out_of_space(error):
            raise
        raise CompressionError(
            f"There is no space left to write '{target}' (or a quota or limit is reached); free some, or write to another disk. "
            "Nothing was written."
        ) from error


def is_out_of_space(error: BaseException) -> bool:
    """Return whether an error says that the disk is full, or a limit on it reached; that of safetensors is no OSError."""
    if isinstance(error, OSError):
        return error.errno in NO_SPACE
    return type(error).__name__ == "SafetensorError" and any(f"(os error {code})" in str(error) for code in NO_SPACE)


def _remove(folder: Path) -> None:
    """Remove a folder, to the end even if interrupted once."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _settle(path: Path) -> None:
    """Give what was temporary, and so private, the permissions that ordinary files and folders have."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
