"""Calls of a file that are timed: what a runtime provides for that, without PyTorch.

Modules with a `Load` import their runtime alone, because the memory of their process is measured.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Shapes = Sequence[tuple[int, ...]]
"""The shape [N, ...] of each input, in the network's order of dimensions."""
Call = Callable[[], object]
Load = Callable[[Path, int], Callable[[Shapes], Call]]
"""File, threads -> a function from shapes to a call on noise. It raises UsageError if the runtime
cannot load the file, or if the file takes other inputs."""


def noise(shape: Sequence[int], dtype: Any) -> Array:
    """Return an input for timing: white noise, random pixels, or zeros for other integers."""
    draw, kind = np.random.default_rng(0), np.dtype(dtype)
    if np.issubdtype(kind, np.floating):
        return draw.standard_normal(shape, dtype=np.float32).astype(kind)
    if kind == np.uint8:
        return draw.integers(0, 256, shape, dtype=np.uint8)
    return np.zeros(shape, kind)
