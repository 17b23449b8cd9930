"""Transposed convolutions as convolutions: each output pixel of a block is a channel of its own.

An output entry n is x's entry m times the weight's entry k wherever n + p = s m + d k, for stride
s, padding p and dilation d. So the entries with the same r = (n + p) mod s are a convolution of x
with every s-th entry of the weight from r. All of them together have s² as many channels, which
`DEPTH_TO_SPACE` then puts side by side.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gdfq.deploy.litert.emitter import Emitter, Value
from gdfq.deploy.litert.moves import part, reordered
from gdfq.deploy.litert.windows import Windows
from gdfq.functional.windows import per_axis


@dataclass(frozen=True, eq=False)
class SubPixels:
    """A transposed convolution over two axes as a convolution.

    Attributes:
        filters: Its weight [g s² O/g, I/g, J, J], channels in the order (group, pixel, channel).
        windows: Its windows.
        stride: The stride of the transposed convolution: pixels of a block by axis.
        first: The first entry by axis of the blocks side by side that belongs to the output.
        groups: Its groups.
    """

    filters: Tensor
    windows: Windows
    stride: tuple[int, ...]
    first: tuple[int, ...]
    groups: int

    @property
    def channel_of(self) -> list[int]:
        """The channel of the output that each channel of the convolution belongs to."""
        blocks = self.stride[0] * self.stride[1]
        by_group = self.filters.shape[0] // blocks // self.groups
        return [
            group * by_group + channel
            for group in range(self.groups)
            for _ in range(blocks)
            for channel in range(by_group)
        ]

    def assembled(self, emit: Emitter, x: Value, shape: Sequence[int], name: str) -> Value:
        """Return the output of the transposed convolution, given that of the convolution.

        Args:
            emit: The file.
            x: The output of the convolution.
            shape: Shape of the result, a map.
            name: Name of the result.
        """
        batch, channels, *_ = shape
        high, wide = self.stride
        if self.groups > 1:
            rows = x.shape[2:]
            by_group = (batch, self.groups, high * wide, channels // self.groups, *rows)
            x = emit.reshaped(x, by_group, f"{name}.groups")
            x = reordered(x, (0, 2, 1, 3, 4, 5))
            x = emit.reshaped(x, (batch, high * wide * channels, *rows), f"{name}.pixels")
        x = emit.in_order(x, (0, 2, 3, 1))
        sides = tuple(n * s for n, s in zip(x.shape[2:], self.stride, strict=True))
        crops = [
            (dim, start, shape[dim])
            for dim, start, side in zip((2, 3), self.first, sides, strict=True)
            if shape[dim] != side
        ]
        names = [name if not crops else f"{name}.blocks", *(f"{name}.rows" for _ in crops[1:])]
        x = _side_by_side(emit, x, (batch, channels, *sides), self.stride, names[0])
        for (dim, start, count), title in zip(crops, [*names[1:], name], strict=False):
            x = part(emit, title, x, dim, start, count)
        return x


def _side_by_side(
    emit: Emitter, x: Value, shape: tuple[int, ...], stride: tuple[int, ...], name: str
) -> Value:
    """Put the pixels of a block, which are channels, side by side."""
    high, wide = stride
    if high == wide == 1:
        return x
    if high == wide:
        result = emit.new(name, shape, x.order, x.tensor.dtype, x.grid)
        return emit.operator("DEPTH_TO_SPACE", result, [x], "DepthToSpaceOptions", blockSize=high)
    batch, channels, *_ = shape
    blocks = (batch, high, wide, channels, *x.shape[2:])
    x = reordered(emit.reshaped(x, blocks, f"{name}.pixels"), (0, 3, 4, 1, 5, 2))
    return emit.in_order(emit.reshaped(x, shape, name), (0, 2, 3, 1))


def sub_pixels(
    weight: Tensor,
    sides: Sequence[int],
    result: Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> SubPixels:
    """Return a transposed convolution over one or two axes as a convolution.

    Args:
        weight: Its weight [I, O/g, *K].
        sides: Lengths of the input.
        result: Lengths of the output.
        stride: Its stride.
        padding: Its padding.
        groups: Its groups.
        dilation: Its dilation.
    """
    axes = len(sides)
    ones = (1,) * (2 - axes)
    steps, gaps = (*ones, *per_axis(stride, axes)), (*ones, *per_axis(dilation, axes))
    pads = (*(0 for _ in ones), *per_axis(padding, axes))
    weight = weight.reshape(*weight.shape[:2], *ones, *weight.shape[2:])
    for dim, (gap, step) in enumerate(zip(gaps, steps, strict=True), start=2):
        weight = _spread(weight, dim, gap, step)
    inputs, channels = weight.shape[0] // groups, weight.shape[1]
    taps = tuple(side // step for side, step in zip(weight.shape[2:], steps, strict=True))
    # [g, I, O, J, s, J, s] -> [g, s, s, O, I, J, J], the last two mirrored
    split = weight.reshape(groups, inputs, channels, taps[0], steps[0], taps[1], steps[1])
    filters = split.permute(0, 4, 6, 2, 1, 3, 5).flip(5, 6).reshape(-1, inputs, *taps)
    skipped = [min(p // s, j - 1) for p, s, j in zip(pads, steps, taps, strict=True)]
    ends = []
    for side, length, p, s, j, q in zip(
        (*ones, *sides), (*ones, *result), pads, steps, taps, skipped, strict=True
    ):
        ends.append((j - 1 - q, max(0, (p + length - 1) // s + 1 - side)))
    windows = Windows((*ones, *sides), taps, (1, 1), (1, 1), tuple(ends))
    first = tuple(p - q * s for p, q, s in zip(pads, skipped, steps, strict=True))
    return SubPixels(filters.contiguous(), windows, steps, first, groups)


def _spread(weight: Tensor, dim: int, gap: int, step: int) -> Tensor:
    """Return a weight with its entries `gap` apart, and zeros up to a multiple of `step`."""
    count = weight.shape[dim]
    length = -(-(gap * (count - 1) + 1) // step) * step
    shape = [length if d == dim else side for d, side in enumerate(weight.shape)]
    spread = weight.new_zeros(shape)
    spread.index_copy_(dim, torch.arange(count) * gap, weight)
    return spread
