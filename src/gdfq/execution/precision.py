"""The precision of the products in layers, and the device they are computed on.

In bfloat16 the products in layers are rounded to 8 significant bits (`torch.autocast`). Statistics,
quantizers, losses, weights and updates stay in float32. In float32 a GPU computes as a CPU does:
PyTorch by itself lets it round the factors of a convolution to 11 significant bits (TF32).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any, Literal

import torch
from torch import Tensor

from gdfq.errors import UsageError

Precision = Literal["float32", "bfloat16"]


def to_float32(x: Tensor) -> Tensor:
    """Return x in float32 if it is bfloat16; any other dtype is returned unchanged."""
    return x.float() if x.dtype == torch.bfloat16 else x


class _FullFloat32:
    """Turns TF32 off for the process while there are users, in any thread."""

    def __init__(self) -> None:
        self._lock, self._users = Lock(), 0
        self._before: list[str] = []

    def enter(self) -> None:
        with self._lock:
            if self._users == 0:
                self._before = [part.fp32_precision for part in _rounding_parts()]
                for part in _rounding_parts():
                    part.fp32_precision = "ieee"
            self._users += 1

    def leave(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                for part, before in zip(_rounding_parts(), self._before, strict=True):
                    part.fp32_precision = before


def _rounding_parts() -> tuple[Any, ...]:
    """The parts of PyTorch that may round factors on a GPU."""
    cudnn = torch.backends.cudnn
    return cudnn.conv, cudnn.rnn, torch.backends.cuda.matmul  # type: ignore[attr-defined]


_full_float32 = _FullFloat32()


@contextmanager
def in_full_float32(device: torch.device) -> Iterator[None]:
    """Within this context no factor of a product in float32 is rounded on a GPU.

    PyTorch has one setting for the process: it is changed while any thread is in such a context.

    Args:
        device: Where the products are computed; on a CPU nothing is changed.
    """
    if device.type != "cuda":
        yield
        return
    _full_float32.enter()
    try:
        yield
    finally:
        _full_float32.leave()


def find_device(name: str) -> torch.device:
    """Return the device of a name.

    Args:
        name: "cpu", "cuda", or "auto" for the GPU if there is one.

    Raises:
        UsageError: There is no such device here.
    """
    available = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    if name == "auto":
        return torch.device(available[-1])
    if name not in available:
        raise UsageError(f"device must be one of auto, {', '.join(available)} here; got {name!r}.")
    return torch.device(name)
