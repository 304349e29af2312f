"""Freed memory is kept for the next array.

An array of some megabytes is handed back to the system when it is freed, and the next one of its size is made of new
pages, each of which costs a fault and is zeroed. A training step makes the same arrays again and again: in the preset
`bench` that is some 24,000 faults a step, and 20 where memory is kept. GNU's allocator can be told to keep it; other
systems' are left as they are. (CuPy's pool does this anyway.)
"""

from __future__ import annotations

import ctypes
import os

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # the names' numbers in <malloc.h>
LARGEST = 32 << 20  # bytes: from here on it always takes, and gives back, whole pages
KEPT = 1 << 30  # bytes


def keep_freed_memory() -> None:
    """Tell GNU's allocator, unless the user has told it something (a variable `MALLOC_...` or `GLIBC_TUNABLES`)."""
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(MMAP_THRESHOLD, LARGEST)
    mallopt(TRIM_THRESHOLD, KEPT)
