"""Tracing by torch: one thread at a time, and without its own warnings."""

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_LOCK = threading.Lock()
"""Concurrent calls of torch.export fail, and lists of warning filters belong to the process."""


@contextmanager
def quiet_tracing() -> Iterator[None]:
    """Within, no other thread traces; warnings, torch's deprecations mostly, are not shown."""
    with _LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def no_tracing() -> Iterator[None]:
    """Within, no thread traces; for moments, because other threads wait here too."""
    with _LOCK:
        yield
