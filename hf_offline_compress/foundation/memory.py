"""Memory that was freed, given back to the system."""

from __future__ import annotations

import ctypes
from contextlib import suppress


def release_memory() -> None:
    """Give back what the C library keeps of freed memory, where it can (glibc), so that the next stage does not add to it.

    Blocks below its threshold, of up to 32 MB, are otherwise kept, and after a forward pass they are so scattered that
    matrices of another size do not fit in between.
    """
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
