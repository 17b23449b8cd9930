"""The precision of the products in layers, and the device they are computed on.

In bfloat16 the products in layers are rounded to 8 significant bits (`torch.autocast`). Statistics,
quantizers, losses, weights and updates stay in float32.
"""

from typing import Literal

import torch
from torch import Tensor

from gdfq.errors import UsageError

Precision = Literal["float32", "bfloat16"]


def to_float32(x: Tensor) -> Tensor:
    """Return x in float32 if it is bfloat16; any other dtype is returned unchanged."""
    return x.float() if x.dtype == torch.bfloat16 else x


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
