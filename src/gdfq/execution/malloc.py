"""Memory that the C library keeps instead of giving it back to the system."""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory_() -> None:
    """Let this process reuse freed memory at once, for its whole life; only glibc can.

    By default glibc maps every tensor of 32 MiB and more afresh and unmaps it when it is freed,
    so that each pass over a network of large images spends more time on page faults than on
    arithmetic: MobileNetV1 at 224x224 runs about twice as fast without. This is a setting of the
    whole process, so programs make it, not the library.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # musl has none
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)


def release_freed_memory() -> None:
    """Give freed memory back to the system, between two stages; only glibc can.

    The stages of a run need tensors of other sizes, so what one has freed lies in pieces that the
    next cannot use, and the process would grow with every stage.
    """
    if not sys.platform.startswith("linux"):
        return
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:  # musl has none
        malloc_trim(0)
