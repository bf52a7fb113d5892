"""Files that are more than data: pickles and models of Keras, which run code when they are read, and archives."""

from __future__ import annotations

import io
import pickletools
import re
import tarfile
import zipfile
from pathlib import Path

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".dill", ".npy", ".npz")
KERAS_SUFFIXES = (".h5", ".hdf5", ".keras")
ARCHIVE_SUFFIXES = (
    ".zip",
    ".tar",
    ".tgz",
    ".tbz",
    ".tbz2",
    ".txz",
    ".gz",
    ".bz2",
    ".xz",
    ".zst",
    ".7z",
    ".rar",
    ".lz4",
)
HDF5 = b"\x89HDF\r\n\x1a\n"
# zip, gzip, bzip2, xz, zstandard, 7z, rar, lz4, and zlib, as joblib writes it.
_ARCHIVES = (
    *(b"PK\x03\x04", b"PK\x05\x06", b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd"),
    *(b"7z\xbc\xaf", b"Rar!\x1a\x07", b"\x04\x22\x4d\x18", b"x\x01", b"x\x9c", b"x\xda"),
)
_LONGEST = 64_000_000  # bytes that are searched for a pickle of text
_ENOUGH = 1_000  # operations of a pickle, one fitting the other, that no text has by chance
_IMPORTED = re.compile(r"[A-Za-z_][\w.]* [A-Za-z_][\w.]*")
_CALLS = ("REDUCE", "OBJ", "INST", "NEWOBJ", "NEWOBJ_EX", "BUILD")


def foreign_kind(file: Path) -> str | None:
    """Return what a file is that must not be published, as the rest of a sentence; None where it may be.

    It is told by the name or the content. Nothing is unpickled or unpacked.
    """
    suffix = file.suffix.lower()
    if suffix in PICKLE_SUFFIXES:
        return "is a pickle, which runs code when it is read"
    if suffix in KERAS_SUFFIXES:
        return "is a model of Keras, which may run code when it is read"
    if suffix == ".safetensors":
        return None
    with file.open("rb") as stream:
        start = stream.read(4096)
        if HDF5 in start:
            return "is a model of Keras (HDF5), which may run code when it is read"
        if _begins_as_pickle(start) or is_pickle(start + stream.read(_LONGEST)) or _is_saved_by_torch(file):
            return "is a pickle, which runs code when it is read"
    if suffix in ARCHIVE_SUFFIXES or start.startswith(_ARCHIVES) or zipfile.is_zipfile(file) or _is_tar(file):
        return "is an archive, which may hold pickles or secrets; unpack it"
    return None


def _begins_as_pickle(start: bytes) -> bool:
    return len(start) > 1 and start[0] == 0x80 and 2 <= start[1] <= 5


def _is_saved_by_torch(file: Path) -> bool:
    """Return whether a file is a zip with a pickle in it, by its list of names."""
    try:
        with zipfile.ZipFile(file) as archive:
            return any(name.lower().endswith(PICKLE_SUFFIXES) for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return False


def is_pickle(content: bytes) -> bool:
    """Return whether bytes begin with a pickle, of the protocols without a header too, which are mostly text.

    Its operations are read, not executed: each must find on the stack what it needs.

    Args:
        content: of a file, or its beginning.
    """
    stack: list[pickletools.StackObject] = []
    grouped = False
    try:
        for count, (operation, value, position) in enumerate(pickletools.genops(io.BytesIO(content))):
            name = operation.name
            if name in ("GLOBAL", "INST") and not _IMPORTED.fullmatch(str(value)):
                return False
            if name == "REDUCE" and not (stack and stack[-1] in (pickletools.pytuple, pickletools.anyobject)):
                return False
            if not _apply(operation, stack):
                return False
            grouped = grouped or name == "MARK"
            if name in _CALLS or (grouped and count >= _ENOUGH):
                return True
            if name == "STOP":
                return not stack and not content[(position or 0) + 1 :].strip()
    except (ValueError, OverflowError, MemoryError):  # no operation, or not the whole of one
        pass
    return False


def _apply(operation: pickletools.OpcodeInfo, stack: list[pickletools.StackObject]) -> bool:
    """Do to a stack of kinds what an operation does to that of values; return whether it can."""
    needed, mark = list(operation.stack_before), pickletools.markobject
    if mark in needed or (operation.name == "POP" and stack and stack[-1] is mark):
        if mark not in stack:
            return False
        while stack.pop() is not mark:
            pass
        needed = needed[: needed.index(mark)] if mark in needed else []
    if len(stack) < len(needed):
        return False
    if needed:
        del stack[-len(needed) :]
    stack.extend(operation.stack_after)
    return True


def _is_tar(file: Path) -> bool:
    try:
        with tarfile.open(file, "r:") as archive:
            return archive.next() is not None
    except (tarfile.TarError, OSError, ValueError):
        return False
