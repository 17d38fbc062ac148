"""Whether glibc keeps freed memory for the next request or gives it back to the system. No result depends on it.

    thresholds(mmap=8 * 2**20, trim=16 * 2**20)

Left alone, glibc raises both thresholds with the buffers that it sees freed, so a program keeps what it once needed.
Where there is no glibc nothing is done.
"""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def thresholds(mmap: int, trim: int | None = None) -> None:
    """Give each buffer of `mmap` bytes or more back once it is freed, and the heap's end when it exceeds `trim`."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, mmap)
        if trim is not None:
            libc.mallopt(M_TRIM_THRESHOLD, trim)
