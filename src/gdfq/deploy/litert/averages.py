"""Sums and means over dimensions and windows, and resizing."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from gdfq.deploy.litert.elementwise import Function, Shape
from gdfq.deploy.litert.emitter import Emitter, NoFormError, Value
from gdfq.deploy.litert.moves import as_map, from_map, over, padded_for, with_last
from gdfq.deploy.litert.windows import Windows, depthwise_options, pooling_windows


def _mean(
    emit: Emitter, name: str, shape: Shape, x: Value, dims: Sequence[int] | None = None, *_: Any
) -> Value:
    return over(emit, "MEAN", name, x, dims or range(len(x.shape)), shape)


def _sum(
    emit: Emitter, name: str, shape: Shape, x: Value, dims: Sequence[int] | None = None, *_: Any
) -> Value:
    return over(emit, "SUM", name, x, dims or range(len(x.shape)), shape)


def _adaptive_average(emit: Emitter, name: str, shape: Shape, x: Value, _size: Any) -> Value:
    """Adaptive average pooling: a mean, equal windows, or products with the matrix of means."""
    spatial = list(zip(range(2, len(shape)), x.shape[2:], shape[2:], strict=True))
    if all(count == 1 for _, _, count in spatial):
        return over(emit, "MEAN", name, x, [dim for dim, *_ in spatial], shape)
    if not any(side % count for _, side, count in spatial):
        windows = pooling_windows(x.shape[2:], [side // count for _, side, count in spatial])
        return average(emit, name, shape, x, windows, windows.divisors(count_include_pad=True))
    for dim, side, count in spatial:
        bins = [range(i * side // count, -(-(i + 1) * side // count)) for i in range(count)]
        matrix = torch.tensor([[(row in b) / len(b) for row in range(side)] for b in bins])
        lengths = tuple(count if d == dim else length for d, length in enumerate(x.shape))
        _, inputs = with_last(emit, name, x, dim)
        weight = emit.file.constant("means", matrix.float().numpy())
        result = emit.new(f"{name}.{dim}", lengths, inputs[0].order)
        x = emit.operator(
            "FULLY_CONNECTED",
            result,
            [*inputs, weight, None],
            "FullyConnectedOptions",
            keepNumDims=True,
        )
    return x


def average(
    emit: Emitter,
    name: str,
    shape: Shape,
    x: Value,
    windows: Windows,
    divisors: np.ndarray[Any, Any],
) -> Value:
    """Return average pooling: a mean over all, or depthwise sums, each times its 1 / n."""
    if windows.is_whole and divisors.item() == math.prod(windows.kernel):
        return over(emit, "MEAN", name, x, range(2, len(shape)), shape)
    mapped, padding = padded_for(emit, as_map(emit, x), windows, name)
    channels, (height, width) = shape[1], windows.kernel
    first = float(divisors.flat[0])
    varies = bool((divisors != first).any())
    ones = np.full((1, height, width, channels), 1.0 if varies else 1 / first, np.float32)
    pooled = emit.new(f"{name}.sums", (*shape[:2], *windows.counts), mapped.order)
    emit.operator(
        "DEPTHWISE_CONV_2D",
        pooled,
        [mapped, emit.file.constant("ones", ones), zeros(emit, channels)],
        "DepthwiseConv2DOptions",
        **depthwise_options(windows, padding),
    )
    if varies:
        factors = emit.constant("factors", torch.from_numpy(1 / divisors), pooled)
        pooled = emit.binary("MUL", f"{name}.means", pooled, factors)
    return from_map(emit, pooled, shape, name)


def zeros(emit: Emitter, channels: int) -> Any:
    return emit.file.constant("zeros", np.zeros(channels, np.float32))


def _average_pool(
    emit: Emitter,
    name: str,
    shape: Shape,
    x: Value,
    kernel: Any,
    stride: Any = (),
    padding: Any = 0,
    ceil: bool = False,
    count_include_pad: bool = True,
    divisor: int | None = None,
) -> Value:
    windows = pooling_windows(x.shape[2:], kernel, stride, padding, 1, ceil)
    divisors = windows.divisors(count_include_pad=count_include_pad)
    if divisor is not None:
        divisors = np.full_like(divisors, divisor)
    return average(emit, name, shape, x, windows, divisors)


def _bilinear(
    emit: Emitter,
    name: str,
    shape: Shape,
    x: Value,
    _size: Any,
    align_corners: bool,
    factors: Sequence[float] | None = None,
) -> Value:
    exact = [side * factor for side, factor in zip(x.shape[2:], factors or (), strict=False)]
    if any(length != count for length, count in zip(exact, shape[2:], strict=False)):
        raise NoFormError("a factor that gives no whole number of pixels")
    x = as_map(emit, x)
    return emit.operator(
        "RESIZE_BILINEAR",
        emit.new(name, shape, x.order),
        [x, emit.numbers(list(shape[2:]))],
        "ResizeBilinearOptions",
        alignCorners=align_corners,
        halfPixelCenters=not align_corners,
    )


AVERAGES: Mapping[str, Function] = {
    "mean": _mean,
    "sum": _sum,
    **dict.fromkeys(("adaptive_avg_pool1d", "adaptive_avg_pool2d"), _adaptive_average),
    **dict.fromkeys(("avg_pool1d", "avg_pool2d"), _average_pool),
    "upsample_bilinear2d": _bilinear,
}
"""By the short name of the operator (`operators.short_name`)."""
