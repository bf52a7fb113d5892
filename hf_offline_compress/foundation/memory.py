"""Memory of this process: how much it uses, and returning freed memory to the system."""

from __future__ import annotations

import ctypes
import re
import sys
from contextlib import suppress
from pathlib import Path


def release_memory() -> None:
    """Give back what the C library keeps of freed memory, where it can (glibc), so that the next stage does not add to it.

    Blocks below its threshold, of up to 32 MB, are otherwise kept, and after a forward pass they are so scattered that
    matrices of another size do not fit in between.
    """
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def resident_memory() -> int:
    """Return the bytes that this process has in memory; where only the most is known (not Linux), that."""
    return _status("VmRSS") or peak_memory()


def peak_memory() -> int:
    """Return the most bytes that this process has had in memory so far; 0 where the system does not say (Windows)."""
    if (known := _status("VmHWM")) is not None:
        return known
    with suppress(ImportError):
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024
    return 0


def _status(name: str) -> int | None:
    with suppress(OSError):
        if found := re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text()):
            return int(found[1]) * 1024
    return None
