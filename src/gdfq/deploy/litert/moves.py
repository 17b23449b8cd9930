"""Operators that only move numbers, on codes as on floats."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gdfq.deploy.litert.emitter import Emitter, NoFormError, Value
from gdfq.deploy.litert.layout import grows_with_batch, in_file
from gdfq.deploy.litert.windows import VALID, Windows, pooling_windows
from gdfq.functional.windows import per_axis, source_pixels

Shape = tuple[int, ...]
Move = Callable[..., Value | list[Value]]
"""(emitter, name, tensor, shape or shapes of the result, *arguments of the operator, **others)."""


def reshaped(emit: Emitter, name: str, x: Value, shape: Shape, *_: Any, **__: Any) -> Value:
    return emit.reshaped(x, shape, name)


def copied(_emit: Emitter, _name: str, x: Value, _shape: Shape, *_: Any, **__: Any) -> Value:
    return x


def reordered(x: Value, dims: Sequence[int]) -> Value:
    """Return a tensor with dimensions of the network in this order; the file's tensor stays."""
    order = tuple(dims.index(dim) for dim in x.order)
    return Value(x.tensor, order, tuple(x.shape[dim] for dim in dims))


def _permuting(function: Callable[..., Tensor]) -> Move:
    """Return the move of a permutation of dimensions: the file's tensor stays."""

    def permuted(_emit: Emitter, _name: str, x: Value, _shape: Shape, *args: Any) -> Value:
        labels = torch.empty([dim + 1 for dim in range(len(x.shape))], device="meta")
        return reordered(x, [length - 1 for length in function(labels, *args).shape])

    return permuted


def sliced(
    emit: Emitter,
    name: str,
    x: Value,
    shape: Shape,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,  # noqa: ARG001 (the result's shape has it)
    step: int = 1,
) -> Value:
    """aten.slice."""
    side, count = x.shape[dim], shape[dim]
    first = 0 if start is None else max(0, start + side) if start < 0 else start
    if step == 1:
        return part(emit, name, x, dim, first, count)
    return gathered(emit, name, x, dim, range(first, first + count * step, step))


def part(emit: Emitter, name: str, x: Value, dim: int, start: int, count: int) -> Value:
    """Return `count` entries of a dimension."""
    dim %= len(x.shape)
    shape = [count if d == dim else length for d, length in enumerate(x.shape)]
    if shape == list(x.shape):
        return x
    if grows_with_batch(x.shape[dim]):
        raise NoFormError("a part of the batch")
    begin, size = [0] * len(shape), [-1] * len(shape)
    begin[x.axis(dim)], size[x.axis(dim)] = start, count
    result = emit.new(name, shape, x.order, x.tensor.dtype, x.grid)
    return emit.operator("SLICE", result, [x, emit.numbers(begin), emit.numbers(size)])


def gathered(emit: Emitter, name: str, x: Value, dim: int, entries: Sequence[int]) -> Value:
    """Return some entries of a dimension, in this order."""
    dim %= len(x.shape)
    if grows_with_batch(x.shape[dim]):
        raise NoFormError("an operator on entries of the batch")
    if list(entries) == list(range(x.shape[dim])):
        return x
    shape = [len(entries) if d == dim else length for d, length in enumerate(x.shape)]
    result = emit.new(name, shape, x.order, x.tensor.dtype, x.grid)
    indices = emit.numbers(list(entries))
    return emit.operator("GATHER", result, [x, indices], "GatherOptions", axis=x.axis(dim))


def selected(emit: Emitter, name: str, x: Value, shape: Shape, dim: int, index: int) -> Value:
    one = part(emit, f"{name}.part", x, dim, index % x.shape[dim], 1)
    return emit.reshaped(one, shape, name)


def divided(
    emit: Emitter, name: str, x: Value, shapes: Sequence[Shape], _sizes: Any, dim: int = 0
) -> list[Value]:
    """Return the parts of aten.split and aten.chunk."""
    parts, start = [], 0
    for index, shape in enumerate(shapes):
        parts.append(part(emit, f"{name}.{index}", x, dim, start, shape[dim]))
        start += shape[dim]
    return parts


def unbound(
    emit: Emitter, name: str, x: Value, shapes: Sequence[Shape], dim: int = 0
) -> list[Value]:
    return [
        selected(emit, f"{name}.{index}", x, shape, dim, index)
        for index, shape in enumerate(shapes)
    ]


def flipped(emit: Emitter, name: str, x: Value, _shape: Shape, dims: Sequence[int]) -> Value:
    for dim in dims:
        x = gathered(emit, name, x, dim, range(x.shape[dim] - 1, -1, -1))
    return x


def rolled(
    emit: Emitter, name: str, x: Value, _shape: Shape, shifts: Any, dims: Sequence[int] = ()
) -> Value:
    if not dims:
        raise NoFormError("a roll over all entries")
    for dim, shift in zip(dims, per_axis(shifts, len(dims)), strict=True):
        side = x.shape[dim]
        if grows_with_batch(side):
            raise NoFormError("a roll over the batch")
        x = gathered(emit, name, x, dim, [(i - shift) % side for i in range(side)])
    return x


def padded(
    emit: Emitter,
    name: str,
    x: Value,
    _shape: Shape,
    pads: Sequence[int],
    *rest: Any,
    value: float | None = None,
    mode: str = "constant",
) -> Value:
    """aten.pad and aten.constant_pad_nd, whose pads begin with the last dimension."""
    for given in rest:
        mode, value = (given, value) if isinstance(given, str) else (mode, given)
    rank = len(x.shape)
    ends = {rank - 1 - i: (pads[2 * i], pads[2 * i + 1]) for i in range(len(pads) // 2)}
    if mode != "constant":
        return _by_entries(emit, name, x, ends, _INDICES[mode])
    if any(end < 0 for pair in ends.values() for end in pair):
        for dim, (before, after) in ends.items():
            kept = x.shape[dim] + min(before, 0) + min(after, 0)
            x = part(emit, f"{name}.part", x, dim, max(0, -before), kept)
        ends = {dim: (max(0, a), max(0, b)) for dim, (a, b) in ends.items()}
    return with_border(emit, name, x, ends, value or 0.0)


def with_border(
    emit: Emitter, name: str, x: Value, ends: Mapping[int, tuple[int, int]], value: float
) -> Value:
    """Return a tensor with a number around it, which for codes must be 0 or that of a code."""
    shape = tuple(side + sum(ends.get(dim, (0, 0))) for dim, side in enumerate(x.shape))
    if shape == x.shape:
        return x
    room = emit.numbers(np.array([ends.get(dim, (0, 0)) for dim in x.order]))
    result = emit.new(name, shape, x.order, x.tensor.dtype, x.grid)
    if value == 0:
        return emit.operator("PAD", result, [x, room], "PadOptions")
    number: float = value
    if x.grid is not None:
        number = round(value / x.grid.scales[0]) + x.grid.zero_point
    border = emit.file.constant("border", np.array([number], x.tensor.dtype), x.grid)
    return emit.operator("PADV2", result, [x, room, border], "PadV2Options")


def _reflected(side: int, before: int, after: int) -> list[int]:
    return [
        *range(before, 0, -1),
        *range(side),
        *range(side - 2, side - 2 - after, -1),
    ]


def _repeated(side: int, before: int, after: int) -> list[int]:
    return [*[0] * before, *range(side), *[side - 1] * after]


def _circular(side: int, before: int, after: int) -> list[int]:
    return [i % side for i in range(-before, side + after)]


_INDICES = {"reflect": _reflected, "replicate": _repeated, "circular": _circular}


def _by_entries(
    emit: Emitter,
    name: str,
    x: Value,
    ends: Mapping[int, tuple[int, int]],
    entries: Callable[[int, int, int], list[int]],
) -> Value:
    for dim, (before, after) in ends.items():
        x = gathered(emit, name, x, dim, entries(x.shape[dim], before, after))
    return x


def _padding(mode: str) -> Move:
    def padded_2d(emit: Emitter, name: str, x: Value, shape: Shape, pads: Sequence[int]) -> Value:
        return padded(emit, name, x, shape, pads, mode)

    return padded_2d


def as_map(emit: Emitter, x: Value) -> Value:
    """Return [N, C, L] or [N, C, H, W] as a map with its channels last."""
    if len(x.shape) not in {3, 4}:
        raise NoFormError(f"a layer or pooling of {len(x.shape) - 2} dimensions")
    if len(x.shape) == 3:
        batch, channels, side = x.shape
        name = f"{emit.name_of(x)}.map"
        x = emit.reshaped(emit.in_order(x, (0, 2, 1)), (batch, channels, 1, side), name)
    return emit.in_order(x, (0, 2, 3, 1))


def from_map(emit: Emitter, x: Value, shape: Shape, name: str) -> Value:
    """Return a map of height 1 as the sequence [N, C, L] that it stands for, if `shape` is one."""
    return x if len(shape) == 4 else emit.reshaped(x, shape, name)


def padded_for(
    emit: Emitter, x: Value, windows: Windows, name: str, value: float = 0.0
) -> tuple[Value, int]:
    """Return a map with the border that windows need, and the padding of their operator."""
    padding, ends = windows.padding()
    if not ends:
        return x, padding
    return with_border(emit, f"{name}.pad", x, dict(zip((2, 3), ends, strict=True)), value), VALID


def max_pooled(
    emit: Emitter,
    name: str,
    x: Value,
    shape: Shape,
    kernel: Any,
    stride: Any = (),
    padding: Any = 0,
    dilation: Any = 1,
    ceil: bool = False,
) -> Value:
    """aten.max_pool1d and aten.max_pool2d."""
    windows = pooling_windows(x.shape[2:], kernel, stride, padding, dilation, ceil)
    if set(windows.dilation) != {1}:
        raise NoFormError("maximum pooling with dilation")
    low = float(np.finfo(np.float32).min)
    if x.grid is not None:
        lowest = _lowest(x)
        low = (lowest - x.grid.zero_point) * x.grid.scales[0]
    mapped, pad = padded_for(emit, as_map(emit, x), windows, name, low)
    pooled = emit.new(
        name if len(shape) == 4 else f"{name}.map",
        (*shape[:2], *windows.counts),
        mapped.order,
        x.tensor.dtype,
        x.grid,
    )
    height, width = windows.kernel
    emit.operator(
        "MAX_POOL_2D",
        pooled,
        [mapped],
        "Pool2DOptions",
        padding=pad,
        strideH=windows.stride[0],
        strideW=windows.stride[1],
        filterHeight=height,
        filterWidth=width,
    )
    return from_map(emit, pooled, shape, name)


def _lowest(x: Value) -> int:
    """Return a stored code that no code of a tensor is below."""
    info = np.iinfo(x.tensor.dtype)
    assert x.grid is not None
    # A border of zero points needs no PADV2.
    return info.min if x.grid.zero_point > info.min else x.grid.zero_point


def adaptive_max_pooled(
    emit: Emitter, name: str, x: Value, shapes: Sequence[Shape], *_: Any
) -> list[Value]:
    """aten.adaptive_max_pool2d: pooling with equal windows, entries of smaller ones repeated."""
    shape, windows = shapes[0], []
    for dim, count in enumerate(shape[2:], start=2):
        side = x.shape[dim]
        bins = [range(i * side // count, -(-(i + 1) * side // count)) for i in range(count)]
        windows.append(max(map(len, bins)))
        entries = [b[min(i, len(b) - 1)] for b in bins for i in range(windows[-1])]
        x = gathered(emit, f"{name}.windows", x, dim, entries)
    return [max_pooled(emit, name, x, shape, windows)]


def _extreme(kind: str) -> Move:
    def reduced(
        emit: Emitter, name: str, x: Value, shape: Shape, dims: Any = (), _keep: bool = False
    ) -> Value:
        every = [dims] if isinstance(dims, int) else list(dims) or list(range(len(x.shape)))
        return over(emit, kind, name, x, every, shape)

    return reduced


def _extreme_and_index(kind: str) -> Move:
    def reduced(
        emit: Emitter, name: str, x: Value, shapes: Sequence[Shape], dim: int, *_: Any
    ) -> list[Value]:
        return [over(emit, kind, name, x, [dim], shapes[0])]

    return reduced


def over(emit: Emitter, kind: str, name: str, x: Value, dims: Sequence[int], shape: Shape) -> Value:
    """Reduce dimensions of a tensor."""
    every = {dim % len(x.shape) for dim in dims}
    keeps = len(shape) == len(x.shape)
    order = x.order
    if not keeps:
        rest = sorted(set(x.order) - every)
        order = tuple(rest.index(dim) for dim in x.order if dim not in every)
    axes = emit.numbers(sorted(x.axis(dim) for dim in every))
    result = emit.new(name, shape, order, x.tensor.dtype, x.grid)
    return emit.operator(kind, result, [x, axes], "ReducerOptions", keepDims=keeps)


def nearest(
    emit: Emitter,
    name: str,
    x: Value,
    shape: Shape,
    _size: Any,
    factors: Sequence[float] | None = None,
) -> Value:
    """aten.upsample_nearest1d and aten.upsample_nearest2d."""
    scales: Sequence[float | None] = factors or [None] * (len(shape) - 2)
    lines = list(zip(x.shape[2:], shape[2:], scales, strict=True))
    pixels = [source_pixels(*line) for line in lines]
    as_divided = [[i * side // count for i in range(count)] for side, count, _ in lines]
    if pixels != as_divided or len(shape) != 4 or any(count % side for side, count, _ in lines):
        for dim, entries in enumerate(pixels, start=2):
            x = gathered(emit, name, x, dim, entries)
        return x
    x = as_map(emit, x)
    result = emit.new(name, shape, x.order, x.tensor.dtype, x.grid)
    size = emit.numbers(list(shape[2:]))
    return emit.operator(
        "RESIZE_NEAREST_NEIGHBOR", result, [x, size], "ResizeNearestNeighborOptions"
    )


def joined(emit: Emitter, name: str, parts: Sequence[Value], dim: int, shape: Shape) -> Value:
    """Return the concatenation of tensors on one grid, or of floats."""
    first = max(parts, key=lambda value: value.shape[dim])
    result = emit.new(name, shape, first.order, first.tensor.dtype, first.grid)
    ordered = [emit.in_order(value, first.order) for value in parts]
    axis = result.axis(dim)
    return emit.operator("CONCATENATION", result, ordered, "ConcatenationOptions", axis=axis)


def shuffled(emit: Emitter, name: str, x: Value, shape: Shape, groups: int) -> Value:
    """aten.channel_shuffle."""
    batch, channels, *sides = shape
    x = emit.reshaped(x, (batch, groups, channels // groups, *sides), f"{name}.groups")
    return emit.reshaped(reordered(x, (0, 2, 1, *range(3, len(x.shape)))), shape, name)


def pixels_shuffled(emit: Emitter, name: str, x: Value, shape: Shape, r: int) -> Value:
    """aten.pixel_shuffle: [N, C r², H, W] -> [N, C, H r, W r]."""
    batch, channels, height, width = shape
    x = emit.reshaped(x, (batch, channels, r, r, height // r, width // r), f"{name}.blocks")
    return emit.reshaped(reordered(x, (0, 1, 4, 2, 5, 3)), shape, name)


def pixels_unshuffled(emit: Emitter, name: str, x: Value, shape: Shape, r: int) -> Value:
    """aten.pixel_unshuffle: [N, C, H r, W r] -> [N, C r², H, W]."""
    batch, channels, height, width = shape
    x = emit.reshaped(x, (batch, channels // r**2, height, r, width, r), f"{name}.blocks")
    return emit.reshaped(reordered(x, (0, 1, 3, 5, 2, 4)), shape, name)


def repeated(emit: Emitter, name: str, x: Value, shape: Shape, counts: Sequence[int]) -> Value:
    """aten.repeat."""
    missing = len(counts) - len(x.shape)
    if missing:
        x = emit.reshaped(x, (*(1,) * missing, *x.shape), f"{name}.dims")
    result = emit.new(name, shape, x.order, x.tensor.dtype, x.grid)
    return emit.operator("TILE", result, [x, emit.numbers([counts[dim] for dim in x.order])])


def broadcast(emit: Emitter, name: str, x: Value, shape: Shape, *_: Any, **__: Any) -> Value:
    """aten.expand, whose new entries must not depend on the batch."""
    missing = len(shape) - len(x.shape)
    if missing:
        x = emit.reshaped(x, (*(1,) * missing, *x.shape), f"{name}.dims")
    counts = [new // old for new, old in zip(shape, x.shape, strict=True)]
    if all(count == 1 for count in counts):
        return x
    if -1 in in_file(counts):
        raise NoFormError("a tensor that is repeated for each entry of the batch")
    return repeated(emit, name, x, shape, counts)


_RESHAPES = ("reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "view")
_PERMUTING: Mapping[str, Callable[..., Tensor]] = {
    "permute": torch.permute,
    "transpose": torch.transpose,
    "t": torch.t,
    "movedim": torch.movedim,
}

MOVES: Mapping[str, Move] = {
    **dict.fromkeys(_RESHAPES, reshaped),
    **dict.fromkeys(("clone", "contiguous"), copied),
    **{name: _permuting(function) for name, function in _PERMUTING.items()},
    "slice": sliced,
    "select": selected,
    "split": divided,
    "split_with_sizes": divided,
    "chunk": divided,
    "unbind": unbound,
    "flip": flipped,
    "roll": rolled,
    "pad": padded,
    "constant_pad_nd": padded,
    "reflection_pad2d": _padding("reflect"),
    "replication_pad2d": _padding("replicate"),
    "max_pool1d": max_pooled,
    "max_pool2d": max_pooled,
    "adaptive_max_pool2d": adaptive_max_pooled,
    "amax": _extreme("REDUCE_MAX"),
    "amin": _extreme("REDUCE_MIN"),
    "max": _extreme_and_index("REDUCE_MAX"),
    "min": _extreme_and_index("REDUCE_MIN"),
    "upsample_nearest1d": nearest,
    "upsample_nearest2d": nearest,
    "channel_shuffle": shuffled,
    "pixel_shuffle": pixels_shuffled,
    "pixel_unshuffle": pixels_unshuffled,
    "repeat": repeated,
    "expand": broadcast,
}
"""By the short name of the operator (`operators.short_name`)."""


def with_last(emit: Emitter, name: str, x: Value, dim: int) -> tuple[Value, list[Value]]:
    """Return a result and its input with a dimension last in the file."""
    dim %= len(x.shape)
    x = emit.in_order(x, (*(d for d in x.order if d != dim), dim))
    return emit.like(name, x), [x]
