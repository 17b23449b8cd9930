"""Operators that compute each float from those in the same place."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from gdfq.data.preprocessing import Preprocessing
from gdfq.deploy.litert.emitter import Emitter, NoFormError, Value
from gdfq.deploy.litert.layout import in_file

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


def _power(emit: Emitter, name: str, _shape: Shape, x: Operand, exponent: Operand) -> Value:
    if exponent == 2 and isinstance(x, Value):
        return emit.unary("SQUARE", name, x)
    return calculate(emit, "POW", name, x, exponent)


def _reciprocal(emit: Emitter, name: str, _shape: Shape, x: Value) -> Value:
    return calculate(emit, "DIV", name, 1.0, x)


def normalised_pixels(emit: Emitter, pixels: Value, preprocessing: Preprocessing) -> Value:
    """Return (x / 255 − mean) / std of uint8 pixels, as one factor and one shift by channel."""
    numbers = emit.operator("CAST", emit.new("pixels", pixels.shape, pixels.order), [pixels])
    mean, std = (
        torch.tensor(v, dtype=torch.float64) for v in (preprocessing.mean, preprocessing.std)
    )
    shape = (-1, *(1,) * (len(pixels.shape) - 2))
    scaled = calculate(emit, "MUL", "pixels.scaled", numbers, (1 / (255 * std)).reshape(shape))
    return calculate(emit, "ADD", "pixels.normalised", scaled, (-mean / std).reshape(shape))


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

ELEMENTWISE: Mapping[str, Function] = {
    **{name: _unary(kind) for name, kind in _ELEMENTWISE.items()},
    **{name: _binary(kind) for name, kind in _BINARY.items()},
    "rsub": _reversed_difference,
    "silu": _silu,
    "hardsigmoid": _hard_sigmoid,
    "gelu": _gelu,
    "leaky_relu": _leaky,
    "prelu": _prelu,
    "pow": _power,
    "reciprocal": _reciprocal,
    "softplus": _softplus,
    "mish": _mish,
    "elu": _elu,
}
"""By the short name of the operator (`operators.short_name`)."""
