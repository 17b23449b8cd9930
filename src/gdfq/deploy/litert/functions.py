"""Operators that compute floats from floats."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gdfq.data.preprocessing import Preprocessing
from gdfq.deploy.litert.emitter import Emitter, NoFormError, Value
from gdfq.deploy.litert.layout import in_file
from gdfq.deploy.litert.moves import as_map, from_map, over, padded_for
from gdfq.deploy.litert.windows import Windows, pooling_windows

Shape = tuple[int, ...]
Operand = Value | Tensor | float
Function = Callable[..., Value]
"""(emitter, name, shape of the result, *arguments, **others): tensors are values, constants
tensors."""


def calculate(emit: Emitter, kind: str, name: str, x: Operand, y: Operand) -> Value:
    """Return a function of two operands, of which one may be constant."""
    like = x if isinstance(x, Value) else y
    assert isinstance(like, Value)
    x, y = (value if isinstance(value, Value) else _constant(emit, value, like) for value in (x, y))
    return emit.binary(kind, name, x, y)


def _constant(emit: Emitter, value: Tensor | float, like: Value) -> Value:
    if isinstance(value, Tensor):
        return emit.constant("constant", value, emit.of_rank(like, value.ndim))
    return emit.scalar(value, like)


def _binary(kind: str) -> Function:
    def binary(
        emit: Emitter, name: str, _shape: Shape, x: Operand, y: Operand, alpha: float = 1
    ) -> Value:
        if alpha != 1:
            y = calculate(emit, "MUL", f"{name}.alpha", y, alpha)
        return calculate(emit, kind, name, x, y)

    return binary


def _unary(kind: str) -> Function:
    def unary(emit: Emitter, name: str, _shape: Shape, x: Value) -> Value:
        return emit.unary(kind, name, x)

    return unary


def _reversed_difference(
    emit: Emitter, name: str, _shape: Shape, x: Value, y: Operand, alpha: float = 1
) -> Value:
    assert alpha == 1
    return calculate(emit, "SUB", name, y, x)


def clamped(emit: Emitter, name: str, x: Value, low: float, high: float) -> Value:
    if low == 0 and high == 6:
        return emit.unary("RELU6", name, x)
    if low == 0:
        x = emit.unary("RELU", name if high == math.inf else f"{name}.low", x)
    elif low > -math.inf:
        x = calculate(emit, "MAXIMUM", f"{name}.low", x, low)
    return x if high == math.inf else calculate(emit, "MINIMUM", name, x, high)


def _silu(emit: Emitter, name: str, _shape: Shape, x: Value) -> Value:
    return emit.binary("MUL", name, x, emit.unary("LOGISTIC", f"{name}.sigmoid", x))


def _hard_sigmoid(emit: Emitter, name: str, _shape: Shape, x: Value) -> Value:
    moved = calculate(emit, "ADD", f"{name}.add", x, 3.0)
    return calculate(emit, "MUL", name, emit.unary("RELU6", f"{name}.relu6", moved), 1 / 6)


def _gelu(emit: Emitter, name: str, _shape: Shape, x: Value, approximate: str = "none") -> Value:
    return emit.unary("GELU", name, x, "GeluOptions", approximate=approximate == "tanh")


def _softplus(
    emit: Emitter, name: str, _shape: Shape, x: Value, beta: float = 1.0, _threshold: float = 20.0
) -> Value:
    """log(1 + eˣ) = max(x, 0) + log(1 + e^−|x|), which does not overflow."""
    if beta != 1:
        raise NoFormError("softplus with a factor")
    size = emit.unary("NEG", f"{name}.neg", emit.unary("ABS", f"{name}.abs", x))
    more = calculate(emit, "ADD", f"{name}.one", emit.unary("EXP", f"{name}.exp", size), 1.0)
    rest = emit.unary("LOG", f"{name}.log", more)
    return emit.binary("ADD", name, emit.unary("RELU", f"{name}.relu", x), rest)


def _mish(emit: Emitter, name: str, shape: Shape, x: Value) -> Value:
    soft = _softplus(emit, f"{name}.softplus", shape, x)
    return emit.binary("MUL", name, x, emit.unary("TANH", f"{name}.tanh", soft))


def _elu(emit: Emitter, name: str, _shape: Shape, x: Value, alpha: float = 1.0) -> Value:
    """max(x, 0) + α (e^min(x, 0) − 1)."""
    if alpha == 1:
        return emit.unary("ELU", name, x)
    below = calculate(emit, "MINIMUM", f"{name}.low", x, 0.0)
    less = calculate(emit, "SUB", f"{name}.less", emit.unary("EXP", f"{name}.exp", below), 1.0)
    scaled = calculate(emit, "MUL", f"{name}.alpha", less, alpha)
    return emit.binary("ADD", name, emit.unary("RELU", f"{name}.relu", x), scaled)


def _leaky(emit: Emitter, name: str, _shape: Shape, x: Value, slope: float = 0.01) -> Value:
    return emit.unary("LEAKY_RELU", name, x, "LeakyReluOptions", alpha=slope)


def _prelu(emit: Emitter, name: str, _shape: Shape, x: Value, slope: Tensor) -> Value:
    """x for x > 0, else slope · x, with one slope or one for each channel."""
    x = emit.in_order(x, (0, *range(2, len(x.shape)), 1)) if len(x.shape) > 1 else x
    channels = x.shape[1] if len(x.shape) > 1 else 1
    slopes = slope.detach().float().expand(channels).numpy()
    alpha = emit.file.constant("slopes", slopes.reshape(*(1,) * (len(x.shape) - 2), channels))
    return emit.operator("PRELU", emit.like(name, x), [x, alpha])


def _softmax(emit: Emitter, name: str, _shape: Shape, x: Value, dim: int, *_: Any) -> Value:
    return emit.operator("SOFTMAX", *_with_last(emit, name, x, dim), "SoftmaxOptions", beta=1.0)


def _log_softmax(emit: Emitter, name: str, _shape: Shape, x: Value, dim: int, *_: Any) -> Value:
    return emit.operator("LOG_SOFTMAX", *_with_last(emit, name, x, dim))


def _with_last(emit: Emitter, name: str, x: Value, dim: int) -> tuple[Value, list[Value]]:
    """Return a result and its input with a dimension last in the file."""
    dim %= len(x.shape)
    x = emit.in_order(x, (*(d for d in x.order if d != dim), dim))
    return emit.like(name, x), [x]


def _power(emit: Emitter, name: str, _shape: Shape, x: Operand, exponent: Operand) -> Value:
    if exponent == 2 and isinstance(x, Value):
        return emit.unary("SQUARE", name, x)
    return calculate(emit, "POW", name, x, exponent)


def _reciprocal(emit: Emitter, name: str, _shape: Shape, x: Value) -> Value:
    return calculate(emit, "DIV", name, 1.0, x)


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
        _, inputs = _with_last(emit, name, x, dim)
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


def normalised_pixels(emit: Emitter, pixels: Value, preprocessing: Preprocessing) -> Value:
    """Return (x / 255 − mean) / std of uint8 pixels, as one factor and one shift by channel."""
    numbers = emit.operator("CAST", emit.new("pixels", pixels.shape, pixels.order), [pixels])
    mean, std = (
        torch.tensor(v, dtype=torch.float64) for v in (preprocessing.mean, preprocessing.std)
    )
    shape = (-1, *(1,) * (len(pixels.shape) - 2))
    scaled = calculate(emit, "MUL", "pixels.scaled", numbers, (1 / (255 * std)).reshape(shape))
    return calculate(emit, "ADD", "pixels.normalised", scaled, (-mean / std).reshape(shape))


def normalised(
    emit: Emitter,
    name: str,
    _shape: Shape,
    x: Value,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    _training: bool,
    _momentum: float,
    eps: float,
    *_: Any,
) -> Value:
    """A batch norm in evaluation mode: one factor and one shift for each channel."""
    factor = (variance.double() + eps).rsqrt() * (1 if weight is None else weight.double())
    shift = (0 if bias is None else bias.double()) - mean.double() * factor
    shape = (-1, *(1,) * (len(x.shape) - 2))
    scaled = calculate(emit, "MUL", f"{name}.scaled", x, factor.reshape(shape))
    return calculate(emit, "ADD", name, scaled, shift.reshape(shape))


def _standardised(emit: Emitter, name: str, x: Value, dims: Sequence[int], eps: float) -> Value:
    """Return x with mean 0 and variance 1 over some dimensions."""
    shape = tuple(1 if dim in dims else length for dim, length in enumerate(x.shape))
    mean = over(emit, "MEAN", f"{name}.mean", x, dims, shape)
    centred = emit.binary("SUB", f"{name}.centred", x, mean)
    square = emit.unary("SQUARE", f"{name}.square", centred)
    variance = over(emit, "MEAN", f"{name}.variance", square, dims, shape)
    safe = calculate(emit, "ADD", f"{name}.safe", variance, eps)
    return emit.binary("MUL", f"{name}.unit", centred, emit.unary("RSQRT", f"{name}.factor", safe))


def _scaled(
    emit: Emitter, name: str, x: Value, weight: Tensor | None, bias: Tensor | None
) -> Value:
    if weight is not None:
        x = calculate(emit, "MUL", f"{name}.scaled", x, weight)
    return x if bias is None else calculate(emit, "ADD", name, x, bias)


def _layer_norm(
    emit: Emitter,
    name: str,
    _shape: Shape,
    x: Value,
    dims: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Value:
    last = range(len(x.shape) - len(dims), len(x.shape))
    return _scaled(emit, name, _standardised(emit, name, x, last, eps), weight, bias)


def _rms_norm(
    emit: Emitter,
    name: str,
    _shape: Shape,
    x: Value,
    dims: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Value:
    last = range(len(x.shape) - len(dims), len(x.shape))
    shape = tuple(1 if dim in last else length for dim, length in enumerate(x.shape))
    square = over(
        emit, "MEAN", f"{name}.mean", emit.unary("SQUARE", f"{name}.square", x), last, shape
    )
    small = torch.finfo(torch.float32).eps if eps is None else eps
    safe = calculate(emit, "ADD", f"{name}.safe", square, small)
    unit = emit.binary("MUL", f"{name}.unit", x, emit.unary("RSQRT", f"{name}.factor", safe))
    return _scaled(emit, name, unit, weight, None)


def _group_norm(
    emit: Emitter,
    name: str,
    shape: Shape,
    x: Value,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Value:
    batch, channels, *sides = shape
    split = emit.reshaped(x, (batch, groups, channels // groups, *sides), f"{name}.groups")
    unit = _standardised(emit, name, split, range(2, len(split.shape)), eps)
    rank = (-1, *(1,) * len(sides))
    weight, bias = (None if v is None else v.reshape(rank) for v in (weight, bias))
    return _scaled(emit, name, emit.reshaped(unit, shape, f"{name}.joined"), weight, bias)


def _instance_norm(
    emit: Emitter,
    name: str,
    shape: Shape,
    x: Value,
    weight: Tensor | None,
    bias: Tensor | None,
    _mean: Tensor | None,
    _variance: Tensor | None,
    of_input: bool,
    _momentum: float,
    eps: float,
    *_: Any,
) -> Value:
    if not of_input:
        raise NoFormError("an instance norm of stored statistics")
    return _group_norm(emit, name, shape, x, shape[1], weight, bias, eps)


def _product(emit: Emitter, name: str, shape: Shape, x: Operand, y: Operand) -> Value:
    """A product of matrices, of which one may be constant."""
    like = x if isinstance(x, Value) else y
    assert isinstance(like, Value)
    rank = len(like.shape)
    if min(len(getattr(value, "shape", ())) for value in (x, y)) < 2:
        raise NoFormError("a product with a vector")
    x, y = (
        value
        if isinstance(value, Value)
        else emit.constant(
            "matrix", torch.as_tensor(value), emit.in_order(like, tuple(range(rank)))
        )
        for value in (x, y)
    )
    x, y = (emit.in_order(emit.of_rank(v, len(shape)), tuple(range(len(shape)))) for v in (x, y))
    result = emit.new(name, shape, x.order)
    return emit.operator("BATCH_MATMUL", result, [x, y], "BatchMatMulOptions")


def for_each_image(emit: Emitter, name: str, value: Tensor, shape: Shape, anchor: Value) -> Value:
    """Return a constant once for each entry of the batch: 0 times an entry of `anchor`, plus it.

    Args:
        emit: The file.
        name: Name of the result.
        value: The constant, which broadcasts to `shape`.
        shape: Shape of the result.
        anchor: Floats of the batch.
    """
    if -1 in in_file(shape[1:]) or in_file(shape[:1]) != (-1,):
        raise NoFormError("a tensor that is repeated for each entry of the batch")
    one = (anchor.shape[0], *(1,) * (len(anchor.shape) - 1))
    begin, size = [0] * len(one), [-1, *one[1:]]
    first = emit.operator(
        "SLICE",
        emit.new(f"{name}.entry", one, anchor.order),
        [anchor, emit.numbers(begin), emit.numbers(size)],
    )
    batch = emit.reshaped(first, (shape[0], *(1,) * (len(shape) - 1)), f"{name}.batch")
    zero = calculate(emit, "MUL", f"{name}.zero", batch, 0.0)
    return calculate(emit, "ADD", name, zero, value.expand(1, *shape[1:]))


_ELEMENTWISE = {
    "relu": "RELU",
    "relu6": "RELU6",
    "sigmoid": "LOGISTIC",
    "tanh": "TANH",
    "hardswish": "HARD_SWISH",
    "exp": "EXP",
    "log": "LOG",
    "sqrt": "SQRT",
    "rsqrt": "RSQRT",
    "abs": "ABS",
    "neg": "NEG",
    "square": "SQUARE",
    "sin": "SIN",
    "cos": "COS",
}
_BINARY = {
    "add": "ADD",
    "sub": "SUB",
    "mul": "MUL",
    "div": "DIV",
    "maximum": "MAXIMUM",
    "minimum": "MINIMUM",
}

FUNCTIONS: Mapping[str, Function] = {
    **{name: _unary(kind) for name, kind in _ELEMENTWISE.items()},
    **{name: _binary(kind) for name, kind in _BINARY.items()},
    "rsub": _reversed_difference,
    "silu": _silu,
    "hardsigmoid": _hard_sigmoid,
    "gelu": _gelu,
    "leaky_relu": _leaky,
    "prelu": _prelu,
    "softmax": _softmax,
    "log_softmax": _log_softmax,
    "pow": _power,
    "reciprocal": _reciprocal,
    "mean": _mean,
    "sum": _sum,
    **dict.fromkeys(("adaptive_avg_pool1d", "adaptive_avg_pool2d"), _adaptive_average),
    **dict.fromkeys(("avg_pool1d", "avg_pool2d"), _average_pool),
    "upsample_bilinear2d": _bilinear,
    "batch_norm": normalised,
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
    "instance_norm": _instance_norm,
    "rms_norm": _rms_norm,
    "softplus": _softplus,
    "mish": _mish,
    "elu": _elu,
    **dict.fromkeys(("bmm", "matmul"), _product),
}
"""By the short name of the operator (`operators.short_name`)."""
