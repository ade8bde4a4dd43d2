"""Memory of the process."""

from __future__ import annotations

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of mallopt in <malloc.h>


def reuse_freed_memory() -> bool:
    """Let freed memory serve later tensors, so that training on the CPU does not wait for fresh pages.

    glibc returns each large tensor to the system when it is freed and asks for the next one anew, which costs more than
    a fast kernel: every page of 4 KB is cleared and mapped at its first touch. After this call, memory stays with the
    process until it ends, as GPU memory does with torch's caching allocator, and torch asks for pages of 2 MB if it has
    not made a large tensor yet. Call it once, early. The trainers do.

    Returns:
        Whether it had an effect; it has none without glibc, on Windows and macOS.
    """
    if not sys.platform.startswith("linux"):
        return False
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it at its first large tensor
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))
