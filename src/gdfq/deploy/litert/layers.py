"""Convolutions and linear layers of a `.tflite` file: on codes, or on floats."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from gdfq.deploy.litert.carriers import StoredCodes
from gdfq.deploy.litert.emitter import Emitter, NoFormError, Value
from gdfq.deploy.litert.flatbuffer import Array, Grid
from gdfq.deploy.litert.layout import Order
from gdfq.deploy.litert.moves import as_map, from_map, padded_for
from gdfq.deploy.litert.transposed import sub_pixels
from gdfq.deploy.litert.windows import (
    Windows,
    convolution_options,
    convolution_windows,
    depthwise_options,
)
from gdfq.graph import operators, queries
from gdfq.student.integer_network import IntegerLayer

Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Form:
    """A layer in the operators of the file.

    Attributes:
        kind: The operator that adds products.
        options: The name of its options, and these.
        weight: The weight: codes minus zero point, or floats.
        channels: The dimension of the weight that holds the operator's output channels.
        channel_of: The channel of the layer that each of them belongs to.
        x: The input.
        result: Shape and order of the operator's output.
        finish: Makes the layer's output, under a name, of the operator's; None if they are the
            same.
    """

    kind: str
    options: tuple[str, dict[str, Any]]
    weight: Array
    channels: int
    channel_of: list[int]
    x: Value
    result: tuple[Shape, Order]
    finish: Callable[[Value, str], Value] | None = None

    def along(self, values: Tensor) -> Array:
        """Return values of the layer's channels for those of the operator."""
        every = values.flatten().expand(max(self.channel_of) + 1)
        return every[self.channel_of].numpy()


def form_of(emit: Emitter, node: fx.Node, weight: Tensor, x: Value, shape: Shape) -> Form:
    """Return a layer in the form of the file, its input padded.

    Args:
        emit: The file.
        node: The layer.
        weight: Its weight, codes minus zero point or floats.
        x: Its input.
        shape: Shape of its output.
    """
    if node.kwargs or any(isinstance(option, fx.Node) for option in queries.options_of(node)):
        raise NoFormError("a layer whose options are computed")
    if operators.name_of(node) in operators.LINEARS:
        return _linear(emit, weight, x, shape)
    given = queries.options_of(node)
    if operators.name_of(node) in operators.TRANSPOSED_CONVOLUTIONS:
        return _transposed(emit, node.name, weight, x, shape, given)
    options: tuple[Any, ...] = (*given, *_DEFAULTS[len(given) :])
    stride, padding, dilation, groups = options
    mapped = as_map(emit, x)
    windows = convolution_windows(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    filters = weight.reshape(*weight.shape[:2], *windows.kernel)
    form = _convolution(emit, node.name, filters, mapped, windows, groups)
    if len(shape) == 4:
        return form
    return replace(form, finish=lambda value, name: from_map(emit, value, shape, name))


_DEFAULTS = ((1,), (0,), (1,), 1)
"""Stride, padding, dilation and groups of a convolution."""
_TRANSPOSED_DEFAULTS = ((1,), (0,), (0,), 1, (1,))
"""Stride, padding, output padding, groups and dilation of a transposed convolution."""


def _convolution(
    emit: Emitter, name: str, filters: Tensor, x: Value, windows: Windows, groups: int
) -> Form:
    """Return a convolution of a map with filters [O, I/g, height, width]."""
    padded, padding = padded_for(emit, x, windows, name)
    count = filters.shape[0]
    result = (x.shape[0], count, *windows.counts), x.order
    if groups > 1 and groups == x.shape[1]:
        stored = filters.permute(1, 2, 3, 0).contiguous().numpy()
        options = depthwise_options(windows, padding, count // groups)
        named = ("DepthwiseConv2DOptions", options)
        return Form("DEPTHWISE_CONV_2D", named, stored, 3, list(range(count)), padded, result)
    stored = filters.permute(0, 2, 3, 1).contiguous().numpy()
    named = ("Conv2DOptions", convolution_options(windows, padding))
    return Form("CONV_2D", named, stored, 0, list(range(count)), padded, result)


def _transposed(
    emit: Emitter, name: str, weight: Tensor, x: Value, shape: Shape, given: tuple[Any, ...]
) -> Form:
    options: tuple[Any, ...] = (*given, *_TRANSPOSED_DEFAULTS[len(given) :])
    stride, padding, _, groups, dilation = options
    mapped = as_map(emit, x)
    pixels = sub_pixels(weight, x.shape[2:], shape[2:], stride, padding, groups, dilation)
    form = _convolution(emit, name, pixels.filters, mapped, pixels.windows, groups)
    target = (*shape[:2], *(1,) * (4 - len(shape)), *shape[2:])

    def finish(value: Value, title: str) -> Value:
        inner = title if len(shape) == 4 else f"{title}.assembled"
        assembled = pixels.assembled(emit, value, target, inner)
        return from_map(emit, assembled, shape, title)

    return replace(form, channel_of=pixels.channel_of, finish=finish)


def _linear(emit: Emitter, weight: Tensor, x: Value, shape: Shape) -> Form:
    if x.columns is not None:
        weight = weight[:, torch.from_numpy(x.columns)]
    last = len(x.shape) - 1
    if x.order[-1] != last:
        x = emit.in_order(x, (*(dim for dim in x.order if dim != last), last))
    return Form(
        "FULLY_CONNECTED",
        ("FullyConnectedOptions", {"keepNumDims": len(shape) != 2}),
        weight.numpy(),
        0,
        list(range(weight.shape[0])),
        x,
        (shape, x.order),
    )


def codes_layer(
    emit: Emitter,
    layer: IntegerLayer,
    x: Value,
    shape: Shape,
    carrier: StoredCodes,
    headroom: int = 1,
) -> Value:
    """Write a layer that adds products of codes, and return the codes of its output.

    Args:
        emit: The file.
        layer: The layer.
        x: The codes of its input.
        shape: Shape of its output.
        carrier: How to store the codes of its output.
        headroom: Power of two by which weight and bias are stored larger; the scales are smaller.
    """
    assert layer.weight is not None
    assert layer.input is not None
    form = form_of(emit, layer.node, _offsets(layer) * headroom, x, shape)
    weight = _stored_codes(emit, layer, form, headroom)
    count = shape[queries.channel_dim(layer.node)]
    bias = torch.zeros(count, dtype=torch.int32) if layer.bias is None else layer.bias * headroom
    assert weight.grid is not None
    steps = Grid(tuple(float(layer.input.scale) * scale for scale in weight.grid.scales))
    added = emit.file.constant(f"{layer.weight.name}.bias", form.along(bias), steps)
    name, options = form.options
    inner = carrier if form.finish is None else replace(carrier, name=f"{carrier.name}.map")
    codes = emit.integer(form.kind, inner, form.result, [form.x, weight, added], name, **options)
    return codes if form.finish is None else form.finish(codes, carrier.name)


def float_layer(
    emit: Emitter,
    layer: IntegerLayer,
    weight: Tensor,
    bias: Tensor | None,
    x: Value,
    shape: Shape,
) -> Value:
    """Write a layer of floats; codes of its weight become floats when the file is loaded.

    Args:
        emit: The file.
        layer: The layer.
        weight: Its weight in floats.
        bias: Its bias in floats.
        x: Its input.
        shape: Shape of its output.
    """
    name = layer.node.name if layer.weight is None else layer.weight.name
    # Groups of a transposed convolution have no scales by channel.
    as_codes = layer.weight is not None and layer.weight.scale.numel() in {
        1,
        shape[queries.channel_dim(layer.node)],
    }
    numbers = _offsets(layer) if as_codes else weight.detach().float()
    form = form_of(emit, layer.node, numbers, x, shape)
    if as_codes:
        codes = _stored_codes(emit, layer, form)
        stored = emit.file.tensor(f"{name}.weight.float", form.weight.shape, np.float32)
        emit.file.operator("DEQUANTIZE", [codes], [stored])
    else:
        stored = emit.file.constant(f"{name}.weight", form.weight)
    count = shape[queries.channel_dim(layer.node)]
    values = torch.zeros(count) if bias is None else bias.detach().float()
    added = emit.file.constant(f"{name}.bias", form.along(values))
    options, others = form.options
    title = layer.node.name
    made = emit.new(title if form.finish is None else f"{title}.map", *form.result)
    emit.operator(form.kind, made, [form.x, stored, added], options, **others)
    return made if form.finish is None else form.finish(made, title)


def _offsets(layer: IntegerLayer) -> Tensor:
    """Return codes minus zero point of a layer's weight, which int8 holds."""
    assert layer.weight is not None
    return (layer.weight.codes - layer.weight.zero_point).to(torch.int8)


def _stored_codes(emit: Emitter, layer: IntegerLayer, form: Form, headroom: int = 1) -> Any:
    """Add a weight of codes, with the scale of each output channel."""
    assert layer.weight is not None
    scales = tuple(form.along(layer.weight.scale / headroom).astype(np.float64).tolist())
    grid = Grid(scales, dim=form.channels)
    return emit.file.constant(f"{layer.weight.name}.weight", form.weight, grid)
