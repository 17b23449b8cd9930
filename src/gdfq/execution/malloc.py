"""How the C library handles freed memory."""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory_() -> None:
    """Let this process reuse freed memory immediately. Only glibc supports this.

    By default glibc maps every tensor of 32 MiB or more anew and unmaps it when it is freed. Each
    pass over large images then spends much of its time on page faults: a run on EfficientNet-Lite0
    at 224x224 takes 1.4 times as long without this setting. It holds for the whole process, so the
    command line makes it, not the library.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # musl has none
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)


def release_freed_memory() -> None:
    """Return freed memory to the system between two stages. Only glibc supports this.

    Stages need tensors of different sizes. What one stage freed is fragmented for the next one, so
    the process would grow with every stage.
    """
    if not sys.platform.startswith("linux"):
        return
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:  # musl has none
        malloc_trim(0)
