"""Freed memory is kept for the next tensor of the same process, where the C library would give it back."""

from __future__ import annotations

import ctypes
import os
import platform
from functools import cache
from typing import Final

KEPT: Final = 1 << 30
"""Bytes at the end of the heap that are kept when they are free; what lies beyond goes back to the system."""
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # of malloc.h
_PAD: Final = 1 << 26


@cache
def keep_freed_memory() -> None:
    """Let glibc serve large arrays from its heap; elsewhere, or where MALLOC_* variables are set, do nothing.

    By default an array of more than 32 MB, and with MALLOC_TRIM_THRESHOLD_ set a much smaller one, is a mapping of its
    own: new pages that the system has to clear at first touch. dask sets that variable for its workers; it is not taken
    for the user's. Of a run of the embedded study on two workers 29 per cent of the processor's time was the system's,
    and 4 per cent in another run with such settings (docs/demo.md).
    """
    own = {name for name in os.environ if name.startswith("MALLOC_")} - {"MALLOC_TRIM_THRESHOLD_"}
    if platform.libc_ver()[0] == "glibc" and not own:
        libc = ctypes.CDLL(None)
        for setting, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, KEPT), (_TOP_PAD, _PAD)):
            libc.mallopt(setting, value)
