"""Windows of convolutions and pooling: padding and sizes, in the terms of a `.tflite` file."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gdfq.functional.windows import padding_ends, per_axis
from gdfq.graph.queries import AveragePooling

Ends = tuple[tuple[int, int], ...]
"""Entries that are added before and after each axis."""
SAME, VALID = 0, 1
"""The schema's numbers of paddings."""


@dataclass(frozen=True)
class Windows:
    """The windows of a convolution or pooling over two axes.

    Attributes:
        sides: Lengths of the input.
        kernel: Entries of a window.
        stride: Distance of windows.
        dilation: Distance of the entries of a window.
        pads: Entries before and after each axis.
        ceil: Whether a last window may begin in the input or the padding before it and end beyond.
    """

    sides: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    pads: Ends
    ceil: bool = False

    @property
    def extents(self) -> tuple[int, ...]:
        """Distance of the first and last entry of a window, plus 1."""
        return tuple(gap * (k - 1) + 1 for k, gap in zip(self.kernel, self.dilation, strict=True))

    @property
    def counts(self) -> tuple[int, ...]:
        """Number of windows along each axis."""
        counts = []
        for side, extent, step, (before, after) in zip(
            self.sides, self.extents, self.stride, self.pads, strict=True
        ):
            room = side + before + after - extent
            count = (-(-room // step) if self.ceil else room // step) + 1
            beyond = self.ceil and (count - 1) * step >= side + before
            counts.append(count - beyond)
        return tuple(counts)

    @property
    def is_whole(self) -> bool:
        """Return whether the only window is the input."""
        return self.kernel == self.sides and not any(map(any, self.pads))

    def padding(self) -> tuple[int, Ends]:
        """Return the padding of a file's operator, and what must be padded in front of it.

        SAME divides the entries that are missing, the odd one behind; without it they are padded in
        front.
        """
        room, same = [], True
        for side, extent, step, count, (before, _) in zip(
            self.sides, self.extents, self.stride, self.counts, self.pads, strict=True
        ):
            missing = (count - 1) * step + extent - side
            room.append((before, max(0, missing - before)))
            same &= count == -(-side // step) and before == max(0, missing) // 2
        if not any(map(any, room)):
            return VALID, ()
        return (SAME, ()) if same else (VALID, tuple(room))

    def divisors(self, *, count_include_pad: bool) -> np.ndarray[Any, Any]:
        """Return how many entries PyTorch counts in each window of an average, [*counts]."""
        axes = []
        for side, k, step, count, (before, after) in zip(
            self.sides, self.kernel, self.stride, self.counts, self.pads, strict=True
        ):
            low, high = (-before, side + after) if count_include_pad else (0, side)
            starts = [i * step - before for i in range(count)]
            axes.append([min(start + k, high) - max(start, low) for start in starts])
        rows, columns = axes
        return np.outer(np.array(rows), np.array(columns)).astype(np.float32)


def convolution_windows(
    sides: Sequence[int],
    kernel: Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
) -> Windows:
    """Return the windows of a convolution over one or two axes."""
    count = len(kernel)
    gaps = per_axis(dilation, count)
    ends = padding_ends(padding, kernel, gaps)
    return _over_two(sides, kernel, per_axis(stride, count), gaps, ends)


def pooling_windows(
    sides: Sequence[int],
    kernel: int | Sequence[int],
    stride: int | Sequence[int] = (),
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil: bool = False,
) -> Windows:
    """Return the windows of a pooling over one or two axes."""
    count = len(sides)
    shape = per_axis(kernel, count)
    steps = per_axis(stride, count) if stride else shape
    ends = [(side, side) for side in per_axis(padding, count)]
    return _over_two(sides, shape, steps, per_axis(dilation, count), ends, ceil)


def _over_two(
    sides: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    ends: Sequence[tuple[int, int]],
    ceil: bool = False,
) -> Windows:
    """Return windows over two axes; one axis is a map of height 1."""
    ones = (1,) * (2 - len(sides))
    return Windows(
        (*ones, *sides),
        (*ones, *kernel),
        (*ones, *stride),
        (*ones, *dilation),
        (*((0, 0) for _ in ones), *ends),
        ceil,
    )


def average_windows(pool: AveragePooling, sides: Sequence[int]) -> tuple[Windows, float | None]:
    """Return the windows of an average over positions, and what each sum is divided by.

    Args:
        pool: Options of the average pooling.
        sides: Sides of its input.

    Returns:
        The number is None if windows have several.
    """
    windows = pooling_windows(sides, pool.kernel_size, pool.stride, pool.padding, 1, pool.ceil_mode)
    if pool.divisor_override:
        return windows, float(pool.divisor_override)
    divisors = windows.divisors(count_include_pad=pool.count_include_pad)
    first = float(divisors.flat[0])
    return windows, first if math.isclose(divisors.min(), divisors.max()) else None


def depthwise_options(windows: Windows, padding: int, multiplier: int = 1) -> dict[str, Any]:
    """Return the options of a depthwise convolution."""
    return {**convolution_options(windows, padding), "depthMultiplier": multiplier}


def convolution_options(windows: Windows, padding: int) -> dict[str, Any]:
    """Return the options of a convolution."""
    return {
        "padding": padding,
        "strideH": windows.stride[0],
        "strideW": windows.stride[1],
        "dilationHFactor": windows.dilation[0],
        "dilationWFactor": windows.dilation[1],
    }
