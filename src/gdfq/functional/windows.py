"""Arguments of convolutions, pooling and upsampling, by axis, and the zeros that they pad with."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor


def per_axis(value: int | Sequence[int], count: int) -> list[int]:
    """Return one number for each of `count` axes, of which one may stand for all."""
    values = [value] if isinstance(value, int) else list(value)
    return values * count if len(values) == 1 else values


def padding_ends(
    padding: int | Sequence[int] | str, kernel: Sequence[int], dilation: Sequence[int]
) -> list[tuple[int, int]]:
    """Return how many zeros a convolution adds before and after each axis.

    Args:
        padding: Zeros at both ends, "valid" for none, or "same" for as many as keep the size.
        kernel: Size of the kernel, by axis.
        dilation: Distance of its taps, by axis.
    """
    if isinstance(padding, str):
        sides = zip(kernel, dilation, strict=True)
        totals = [gap * (k - 1) if padding == "same" else 0 for k, gap in sides]
        return [(total // 2, total - total // 2) for total in totals]
    return [(side, side) for side in per_axis(padding, len(kernel))]


def zero_padded(x: Tensor, ends: Sequence[tuple[int, int]]) -> Tensor:
    """Return x with zeros at both ends of its last axes; x itself where there are none to add."""
    return F.pad(x, [n for pair in reversed(ends) for n in pair]) if any(map(any, ends)) else x


def source_pixels(side: int, count: int, factor: float | None) -> list[int]:
    """Return the pixels that PyTorch's nearest upsampling takes along a dimension.

    Args:
        side: Pixels before.
        count: Pixels after.
        factor: The factor if one was given instead of a size.
    """
    scale = np.float32(1 / factor) if factor else np.float32(side) / np.float32(count)
    return floored(np.arange(count, dtype=np.float32) * scale, side)


def floored(positions: np.ndarray[Any, Any], side: int) -> list[int]:
    """Return positions along a dimension as the indices of its entries."""
    return [min(int(position), side - 1) for position in np.floor(positions)]
