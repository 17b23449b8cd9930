"""Operators that ONNX lacks, or that ONNX Runtime computes otherwise, by equal ones that it has.

The functions take the arguments of the operators that they replace and return the same numbers;
means are equal but for the order of their sums. Indices and padding are constants of the file, so
that what only moves codes still moves codes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from gdfq.functional.windows import (
    floored,
    padding_ends,
    per_axis,
    source_pixels,
    zero_padded,
)
from gdfq.graph import operators, queries
from gdfq.graph.operators import name_of
from gdfq.graph.rewrite import Copy, rewrite

_MAX_POOL = (F.max_pool1d, F.max_pool2d, F.max_pool3d)
_AVG_POOL = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)


def with_equivalents(graph: fx.Graph) -> fx.Graph:
    """Return a copy of a graph with the operators replaced that ONNX has no equal form for."""

    def change(copy: Copy, node: fx.Node) -> fx.Node | None:
        equivalent = _equivalent(node)
        if equivalent is None:
            return None
        new = copy.of(node)
        new.target = equivalent
        return new

    return rewrite(graph, change)


def _mixes_convolutions(node: fx.Node) -> bool:
    """Return whether a node is a convolution whose number of groups depends on the batch.

    Each image then has a weight of its own (CondConv).
    """
    return queries.is_layer(node) and any(
        isinstance(option, fx.Node) for option in (*queries.options_of(node), *node.kwargs.values())
    )


def _equivalent(node: fx.Node) -> Callable[..., Any] | None:
    name = name_of(node)
    if _mixes_convolutions(node):
        is_transposed = name in operators.TRANSPOSED_CONVOLUTIONS
        return _transposed_convolution_of_each if is_transposed else _convolution_of_each
    return _EQUIVALENTS.get(name)


def _nearest(dimensions: int) -> Callable[..., Tensor]:
    """Return nearest upsampling by what it is: rows and columns gathered by index.

    PyTorch takes pixel ⌊i · fl(in/out)⌋, ONNX Runtime ⌊i / fl(out/in)⌋: in float32 they differ for
    some sizes, such as 14 to 16. Where both agree the operator stays as it is.
    """
    operator = operators.resolve(operators.NEAREST_UPSAMPLING[dimensions])

    def upsampled(x: Tensor, size: Sequence[int] | None, factors: Sequence[float] | None) -> Tensor:
        sides = x.shape[-dimensions:]
        scales = [None] * dimensions if factors is None else factors
        counts = [int(s * f) for s, f in zip(sides, factors, strict=True)] if factors else size
        assert counts is not None
        lines = list(zip(sides, counts, scales, strict=True))
        pixels = [source_pixels(*line) for line in lines]
        if pixels == [_pixels_of_onnx(*line) for line in lines]:
            result: Tensor = operator(x, size, factors)
            return result
        for dimension, index in enumerate(pixels, start=-dimensions):
            if index != list(range(x.shape[dimension])):
                x = x.index_select(dimension, torch.tensor(index))
        return x

    return upsampled


def _pixels_of_onnx(side: int, count: int, factor: float | None) -> list[int]:
    """Return the pixels that ONNX Runtime takes."""
    scale = np.float32(factor) if factor else np.float32(count) / np.float32(side)
    return floored(np.arange(count, dtype=np.float32) / scale, side)


def _average(dimensions: int) -> Callable[..., Tensor]:
    """Return average pooling that divides by a number of its own: a mean times size / divisor.

    ONNX has no such divisor. What the ceiling mode adds is padded with zeros first.
    """

    def pooled(
        x: Tensor,
        kernel: Sequence[int],
        stride: Sequence[int] = (),
        padding: Sequence[int] = (0,),
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor: int | None = None,
    ) -> Tensor:
        pool: Any = _AVG_POOL[dimensions - 1]
        if divisor is None:
            whole: Tensor = pool(x, kernel, stride or kernel, padding, ceil_mode, count_include_pad)
            return whole
        sides = per_axis(kernel, dimensions)
        steps, pads = per_axis(stride or kernel, dimensions), per_axis(padding, dimensions)
        room = []
        for side, k, s, p in zip(x.shape[2:], sides, steps, pads, strict=True):
            windows = _windows(side, k, s, p, ceil_mode)
            room.append((p, max(0, (windows - 1) * s + k - side - p)))
        mean: Tensor = pool(zero_padded(x, room), sides, steps)
        return mean * (math.prod(sides) / divisor)

    return pooled


def _windows(side: int, kernel: int, stride: int, padding: int, ceil_mode: bool) -> int:
    """Return the number of windows of a pooling along a dimension, as PyTorch counts them."""
    room = side + 2 * padding - kernel
    if not ceil_mode:
        return room // stride + 1
    windows = -(-room // stride) + 1
    return windows - ((windows - 1) * stride >= side + padding)


def _bins(side: int, count: int) -> list[range]:
    """Return the entries of each window of an adaptive pooling: [⌊i s / n⌋, ⌈(i + 1) s / n⌉)."""
    return [range(i * side // count, -(-(i + 1) * side // count)) for i in range(count)]


def _adaptive_maximum(dimensions: int) -> Callable[..., tuple[Tensor]]:
    """Return adaptive maximum pooling by pooling with equal windows.

    Entries of smaller windows are repeated, which does not change a maximum.
    """

    def pooled(x: Tensor, size: Sequence[int]) -> tuple[Tensor]:
        windows = []
        for dimension, count in enumerate(per_axis(size, dimensions), start=-dimensions):
            bins = _bins(x.shape[dimension], count)
            windows.append(max(map(len, bins)))
            entries = [b[min(i, len(b) - 1)] for b in bins for i in range(windows[-1])]
            if entries != list(range(x.shape[dimension])):
                x = x.index_select(dimension, torch.tensor(entries))
        pool: Any = _MAX_POOL[dimensions - 1]
        return (pool(x, windows, windows),)

    return pooled


def _adaptive_average(dimensions: int) -> Callable[..., Tensor]:
    """Return adaptive average pooling: the mean over windows is that of their rows' means.

    A dimension whose windows are unequal is multiplied by the matrix of its means.
    """

    def pooled(x: Tensor, size: Sequence[int]) -> Tensor:
        sides, counts = list(x.shape[-dimensions:]), per_axis(size, dimensions)
        if not any(side % count for side, count in zip(sides, counts, strict=True)):
            windows = [side // count for side, count in zip(sides, counts, strict=True)]
            pool: Any = _AVG_POOL[dimensions - 1]
            mean: Tensor = x.mean([*range(-dimensions, 0)], keepdim=True)
            return mean if windows == sides else pool(x, windows, windows)
        for dimension, (side, count) in enumerate(zip(sides, counts, strict=True), -dimensions):
            if side == count:
                continue
            bins = _bins(side, count)
            means = [[(row in entries) / len(entries) for entries in bins] for row in range(side)]
            x = (x.transpose(dimension, -1) @ torch.tensor(means)).transpose(dimension, -1)
        return x

    return pooled


def _convolution_of_each(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] | str = (0,),
    dilation: Sequence[int] = (1,),
    groups: int = 1,
) -> Tensor:
    """Return a convolution with as many groups as images, as products of matrices.

    Shapes: x [1, g C, *S], weight [g O, C, *K] -> [1, g O, *T].
    """
    count = weight.ndim - 2
    gaps = per_axis(dilation, count)
    x = x.reshape(-1, weight.shape[1], *x.shape[2:])
    x = zero_padded(x, padding_ends(padding, weight.shape[2:], gaps))
    weight = weight.reshape(x.shape[0], weight.shape[0] // groups, *weight.shape[1:])
    return _products(x, weight, bias, per_axis(stride, count), gaps)


def _transposed_convolution_of_each(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] = (0,),
    output_padding: Sequence[int] = (0,),
    groups: int = 1,
    dilation: Sequence[int] = (1,),
) -> Tensor:
    """Return a transposed convolution with as many groups as images, as products of matrices.

    It is the convolution, with the weight mirrored, of x with stride − 1 zeros between its entries.
    Shapes: x [1, g C, *S], weight [g C, O, *K] -> [1, g O, *T].
    """
    count = weight.ndim - 2
    steps, gaps, pads = (per_axis(values, count) for values in (stride, dilation, padding))
    more = per_axis(output_padding, count)
    x = x.reshape(-1, weight.shape[0] // groups, *x.shape[2:])
    for d, step in enumerate(steps, start=2):
        if step > 1:
            side = x.shape[d]
            x = F.pad(x.unsqueeze(d + 1), [*[0, 0] * (x.ndim - d - 1), 0, step - 1])
            x = x.flatten(d, d + 1).narrow(d, 0, (side - 1) * step + 1)
    room = [gap * (k - 1) - p for k, gap, p in zip(weight.shape[2:], gaps, pads, strict=True)]
    x = zero_padded(x, [(r, r + m) for r, m in zip(room, more, strict=True)])
    weight = weight.reshape(x.shape[0], x.shape[1], *weight.shape[1:])
    weight = weight.transpose(1, 2).flip([*range(3, 3 + count)])
    return _products(x, weight, bias, [1] * count, gaps)


def _products(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """Return the convolution of each image with its weight, without padding.

    The columns of an image, [C ∏K, ∏T], are gathered by slices and multiplied by [O, C ∏K].
    Shapes: x [g, C, *S], weight [g, O, C, *K] -> [1, g O, *T].
    """
    kernel = weight.shape[3:]
    sides = [
        (side - gap * (k - 1) - 1) // step + 1
        for side, k, step, gap in zip(x.shape[2:], kernel, stride, dilation, strict=True)
    ]
    parts = []
    for offset in product(*map(range, kernel)):
        part = x
        for d, (o, side, step, gap) in enumerate(
            zip(offset, sides, stride, dilation, strict=True), 2
        ):
            part = part.narrow(d, o * gap, (side - 1) * step + 1)
            if step > 1:
                part = part[(slice(None),) * d + (slice(None, None, step),)]
        parts.append(part)
    columns = torch.stack(parts, 2).flatten(1, 2).flatten(2)
    result = (weight.flatten(2) @ columns).reshape(1, -1, *sides)
    return result if bias is None else result + bias.reshape(1, -1, *[1] * len(kernel))


_EQUIVALENTS: Mapping[str, Callable[..., Any]] = {
    **{name: _nearest(d) for d, name in operators.NEAREST_UPSAMPLING.items()},
    **{name: _average(d) for d, name in operators.AVERAGE_POOLING.items() if d > 1},
    **{name: _adaptive_average(d) for d, name in operators.ADAPTIVE_AVERAGE_POOLING.items()},
    **{name: _adaptive_maximum(d) for d, name in operators.ADAPTIVE_MAX_POOLING.items()},
}
"""By the name of the operator that is replaced."""
