"""The precision of the products in layers, and the device they are computed on.

In bfloat16 the products in layers are rounded to 8 significant bits (`torch.autocast`). Statistics,
quantizers, losses, weights and updates stay in float32. In float32 a GPU computes as a CPU does:
PyTorch by itself lets it round the factors of a convolution to 11 significant bits (TF32).
"""

from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor

from gdfq.errors import UsageError

Precision = Literal["float32", "bfloat16"]


def to_float32(x: Tensor) -> Tensor:
    """Return x in float32 if it is bfloat16; any other dtype is returned unchanged."""
    return x.float() if x.dtype == torch.bfloat16 else x


def in_full_float32() -> AbstractContextManager[Any]:
    """Return a context in which no GPU rounds the factors of convolutions in float32."""
    cudnn = torch.backends.cudnn
    context: AbstractContextManager[Any] = cudnn.flags(
        enabled=cudnn.enabled,
        benchmark=cudnn.benchmark,
        deterministic=cudnn.deterministic,
        allow_tf32=False,
    )
    return context


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
