"""The precision of the products in layers, and the device they are computed on.

In bfloat16 the products in layers are rounded to 8 significant bits (`torch.autocast`). Statistics,
quantizers, losses, weights and updates stay in float32. In float32 a GPU computes as a CPU does:
PyTorch by itself lets it round the factors of a convolution to 11 significant bits (TF32).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
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
        self._restore: list[Callable[[], None]] = []

    def enter(self) -> None:
        with self._lock:
            if self._users == 0:
                self._restore = [_without_tf32_in_cudnn(), _without_tf32_in_matmul()]
            self._users += 1

    def leave(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                for restore in self._restore:
                    restore()


def _without_tf32_in_cudnn() -> Callable[[], None]:
    """Turn it off in convolutions, and return what restores it.

    Of PyTorch's two ways to say it the older one is taken, which `torch.export` reads, unless the
    process uses the newer one: PyTorch refuses to read a mixture.
    """
    cudnn: Any = torch.backends.cudnn
    try:
        before = cudnn.allow_tf32
    except RuntimeError:
        return _in_float32(cudnn.conv, cudnn.rnn)
    cudnn.allow_tf32 = False
    return partial(setattr, cudnn, "allow_tf32", before)


def _without_tf32_in_matmul() -> Callable[[], None]:
    """Turn it off in products of matrices, and return what restores it."""
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:
        return _in_float32(torch.backends.cuda.matmul)
    torch.set_float32_matmul_precision("highest")
    return partial(torch.set_float32_matmul_precision, before)


def _in_float32(*parts: Any) -> Callable[[], None]:
    """Let parts of PyTorch round no factors, by the newer way; return what restores them."""
    before = [part.fp32_precision for part in parts]
    for part in parts:
        part.fp32_precision = "ieee"

    def restore() -> None:
        for part, value in zip(parts, before, strict=True):
            part.fp32_precision = value

    return restore


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


def find_device(name: str | torch.device) -> torch.device:
    """Return the device of a name.

    Args:
        name: "cpu", "cuda", or "auto" for the GPU if there is one; or such a device.

    Raises:
        UsageError: There is no such device here.
    """
    available = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    if name == "auto":
        return torch.device(available[-1])
    name = str(name)
    if name not in available:
        without = "" if torch.cuda.is_available() else ": PyTorch finds no CUDA GPU"
        raise UsageError(
            f"device must be one of auto, {', '.join(available)} here{without}; got {name!r}."
        )
    return torch.device(name)
