"""Normalisation layers in floats."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gdfq.deploy.litert.elementwise import Function, Shape, calculate
from gdfq.deploy.litert.emitter import Emitter, NoFormError, Value
from gdfq.deploy.litert.moves import over


def _batch_norm(
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


def _last(x: Value, dims: Sequence[int]) -> range:
    """Return the last dimensions of a value, as many as a norm goes over."""
    return range(len(x.shape) - len(dims), len(x.shape))


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
    last = _last(x, dims)
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
    last = _last(x, dims)
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


NORMS: Mapping[str, Function] = {
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
    "instance_norm": _instance_norm,
    "rms_norm": _rms_norm,
}
"""By the short name of the operator (`operators.short_name`)."""
