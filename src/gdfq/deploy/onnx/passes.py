"""Passes over an ONNX graph that let integer kernels read integers, and other kernels floats."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from gdfq.data.preprocessing import Preprocessing
from gdfq.errors import GdfqError

DOMAIN = "gdfq"
"""Domain of the quantization operators before they become standard operators."""
PIXELS = "pixels."
"""Prefix of the names of nodes that normalise pixels."""


def pool_globally(graph: ir.Graph) -> None:
    """Write means over all spatial dimensions as GlobalAveragePool, which has integer kernels.

    Kernels fuse it with the quantization after it, which therefore precedes the Flatten.
    """
    for node in list(graph):
        if node.op_type != "ReduceMean" or len(node.inputs) < 2:
            continue
        x, axes = inputs_of(node)
        rank = None if x.shape is None else x.shape.rank()
        if rank is None or rank < 3:
            continue
        averaged = {axis % rank for axis in constant_values(axes).reshape(-1).tolist()}
        if averaged != {*range(2, rank)}:
            continue
        pooled = ir.node("GlobalAveragePool", [x])
        if node.attributes["keepdims"].as_int():
            replace_node(graph, node, [pooled])
            continue
        (old,) = node.outputs
        users = {use.node for use in old.uses()}
        quantizer = users.pop() if len(users) == 1 else None
        if quantizer is None or quantizer.op_type != "FakeQuantize":
            replace_node(graph, node, [pooled, _flatten(pooled)])
            continue
        quantized = ir.node(
            "FakeQuantize",
            [pooled.outputs[0], *quantizer.inputs[1:]],
            quantizer.attributes,
            domain=DOMAIN,
        )
        replace_node(graph, quantizer, [pooled, quantized, _flatten(quantized)])
        graph.remove(node, safe=True)


def _flatten(node: ir.Node) -> ir.Node:
    return ir.node("Flatten", [node.outputs[0]], {"axis": 1})


_GRID_PRESERVING = frozenset(
    {
        *(
            "DepthToSpace",
            "Expand",
            "Flatten",
            "Gather",
            "MaxPool",
            "Pad",
            "ReduceMax",
            "ReduceMin",
        ),
        *("Reshape", "Resize", "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose"),
        "Unsqueeze",
    }
)


def keep_codes(graph: ir.Graph) -> None:
    """Let operators that only move values move codes, so that the next operators read integers."""
    for node in list(graph):
        if node.op_type == "Concat":
            _join_codes(graph, node)
        if node.op_type not in _GRID_PRESERVING:
            continue
        first, *others = inputs_of(node)
        found = codes_and_grid(first)
        if found is None or not _only_moves(node):
            continue
        codes, scale, zero_point = found
        if node.op_type == "Pad" and _mode(node) == "constant":
            others[1:2] = [zero_point]
        count = len(node.outputs)
        moved = ir.node(node.op_type, [codes, *others], node.attributes, num_outputs=count)
        after = [ir.node("DequantizeLinear", [value, scale, zero_point]) for value in moved.outputs]
        replace_node(graph, node, [moved, *after])
        remove_unused(graph, first)


def _only_moves(node: ir.Node) -> bool:
    """Return whether all outputs of a grid-preserving operator are values of its first input."""
    if node.op_type == "Resize":
        return _mode(node) == "nearest"  # otherwise it computes new values
    if node.op_type == "MaxPool":
        return len(node.outputs) == 1  # otherwise it also returns positions
    if node.op_type == "Pad" and _mode(node) == "constant":
        _, _, *values = inputs_of(node)
        # What it pads with need not lie on the grid.
        return not values or values[0] is None or not constant_values(values[0]).any()
    return True


def quantize_after_moves(graph: ir.Graph) -> None:
    """Quantize what only moves values of a grid again, to the same codes.

    Runtimes that read quantization from pairs of QuantizeLinear and DequantizeLinear then find one
    on each side of every operator.
    """
    for node in list(graph):
        grid = _grid_that_is_kept(node)
        if grid is None:
            continue
        for value in node.outputs:
            users = list(value.uses())
            if not users or (node.op_type == "Concat" and all(map(_quantizes, users))):
                continue
            quantize = ir.node("QuantizeLinear", [value, *grid])
            after = ir.node("DequantizeLinear", [quantize.outputs[0], *grid])
            after.outputs[0].shape, after.outputs[0].type = value.shape, value.type
            graph.insert_after(node, [quantize, after])
            for use in users:
                use.node.replace_input_with(use.idx, after.outputs[0])


def _quantizes(use: Any) -> bool:
    return bool(use.node.op_type == "QuantizeLinear")


def _grid_that_is_kept(node: ir.Node) -> tuple[ir.Value, ...] | None:
    """Return scale and zero point of activations that a node only moves or joins, or None."""
    joins = node.op_type == "Concat"
    if not joins and (node.op_type not in _GRID_PRESERVING or not _only_moves(node)):
        return None
    grids = []
    for value in node.inputs if joins else node.inputs[:1]:
        dequantize = None if value is None else value.producer()
        if dequantize is None or dequantize.op_type != "DequantizeLinear":
            return None
        codes, *grid = inputs_of(dequantize)
        if codes.is_initializer():
            return None  # a weight
        grids.append(grid)
    first = grids[0] if grids else []
    if any(
        not _are_equal(one, other) for grid in grids for one, other in zip(grid, first, strict=True)
    ):
        return None
    return tuple(first) or None


def _are_equal(one: ir.Value, other: ir.Value) -> bool:
    return np.array_equal(constant_values(one), constant_values(other))


def _join_codes(graph: ir.Graph, node: ir.Node) -> None:
    """Let a concatenation of tensors on one grid, such as the parts of a rolled one, join codes."""
    values = inputs_of(node)
    found = [codes_and_grid(value) for value in values]
    if None in found:
        return
    codes, scales, zero_points = zip(*(part for part in found if part), strict=True)
    if any(
        not np.array_equal(constant_values(constant), constant_values(first))
        for first, *others in (scales, zero_points)
        for constant in others
    ):
        return
    joined = ir.node("Concat", list(codes), node.attributes)
    after = ir.node("DequantizeLinear", [joined.outputs[0], scales[0], zero_points[0]])
    replace_node(graph, node, [joined, after])
    for value in dict.fromkeys(values):
        remove_unused(graph, value)


def codes_and_grid(value: ir.Value | None) -> tuple[ir.Value, ir.Value, ir.Value] | None:
    """Return codes, scale and zero point of an activation on a grid, or None."""
    dequantize = None if value is None else value.producer()
    if dequantize is None or dequantize.op_type != "DequantizeLinear":
        return None
    codes, scale, *zero_points = inputs_of(dequantize)
    if not zero_points or constant_values(zero_points[0]).dtype != np.uint8:
        return None  # a weight
    return codes, scale, zero_points[0]


def keep_float(graph: ir.Graph) -> None:
    """Make ONNX Runtime compute in float what it would otherwise change.

    A Clip to the range of float32 hides the DequantizeLinear from ONNX Runtime.
    """
    for node in list(graph):
        first = node.inputs[0] if node.inputs else None
        maker = None if first is None else first.producer()
        if maker is None or maker.op_type != "DequantizeLinear" or not _is_changed(node):
            continue
        _hide_input(graph, node, 0)


def keep_float_biases(graph: ir.Graph) -> None:
    """Keep the float biases of layers with a floating-point grid from being rounded.

    ONNX Runtime gives the float bias of a layer between a dequantized input and a dequantized
    weight codes in units of both scales, which are coarse for floats. It does not where the weight
    is hidden.
    """
    for node in list(graph):
        if node.op_type not in LAYERS:
            continue
        makers = [None if value is None else value.producer() for value in node.inputs[:2]]
        if any(m is None or m.op_type != "DequantizeLinear" for m in makers):
            continue
        if any(_dequantizes_floats(maker) for maker in makers if maker is not None):
            _hide_input(graph, node, 1)


_FLOATS = frozenset({ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E5M2})


def _dequantizes_floats(dequantize: ir.Node) -> bool:
    codes, _, *zero_points = inputs_of(dequantize)
    constant = (zero_points[0] if zero_points else codes).const_value
    return constant is not None and constant.dtype in _FLOATS


def _hide_input(graph: ir.Graph, node: ir.Node, index: int) -> None:
    """Hide from ONNX Runtime what makes a float input, by a Clip to the range of float32."""
    value = node.inputs[index]
    low, high = (
        ir.Value(name=name, const_value=ir.tensor(bound, name=name))
        for name, bound in zip(("float.low", "float.high"), _FLOAT32_RANGE, strict=True)
    )
    for bound in (low, high):
        if bound.name not in graph.initializers:
            graph.register_initializer(bound)
    bounds = [graph.initializers["float.low"], graph.initializers["float.high"]]
    hidden = ir.node("Clip", [value, *bounds])
    graph.insert_before(node, [hidden])
    node.replace_input_with(index, hidden.outputs[0])


def _is_changed(node: ir.Node) -> bool:
    """Return whether ONNX Runtime changes a node between dequantized and quantized tensors.

    It rounds float weights of layers to 8 bits. Its integer pooling treats padding differently,
    and its softmax of codes rounds otherwise.
    """
    if node.op_type in LAYERS:
        weight = node.inputs[1]
        return weight is not None and weight.is_initializer()
    if node.op_type == "AveragePool":
        attributes = {name: value.value for name, value in node.attributes.items()}
        return any(attributes.get("pads", ())) or bool(attributes.get("ceil_mode"))
    return node.op_type == "Softmax"


LAYERS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_FLOAT32_RANGE = (np.finfo(np.float32).min, np.finfo(np.float32).max)


def _mode(pad: ir.Node) -> str:
    mode = pad.attributes.get("mode")
    return "constant" if mode is None else mode.as_string()


def normalise_pixels(graph: ir.Graph, preprocessing: Preprocessing) -> None:
    """Make the graph take uint8 pixels: (x / 255 − mean) / std as one factor and one shift."""
    old = graph.inputs[0]
    assert old.shape is not None
    mean, std = (np.array(v, dtype=np.float32) for v in (preprocessing.mean, preprocessing.std))
    shape = (1, len(mean), *[1] * (old.shape.rank() - 2))
    new = ir.Value(name=old.name, type=ir.TensorType(ir.DataType.UINT8), shape=old.shape)
    values = {f"{PIXELS}factor": 1 / (255 * std), f"{PIXELS}shift": -mean / std}
    constants = []
    for name, numbers in values.items():
        value = ir.Value(name=name, const_value=ir.tensor(numbers.reshape(shape), name=name))
        graph.register_initializer(value)
        constants.append(value)
    cast = ir.node("Cast", [new], {"to": ir.DataType.FLOAT})
    scaled = ir.node("Mul", [cast.outputs[0], constants[0]])
    shifted = ir.node("Add", [scaled.outputs[0], constants[1]])
    ir.convenience.replace_all_uses_with(old, shifted.outputs[0])
    old.name = None
    graph.inputs[0] = new
    first = next(iter(graph))
    graph.insert_before(first, [cast, scaled, shifted])


def inputs_of(node: ir.Node) -> tuple[Any, ...]:
    return tuple(node.inputs)


def replace_node(graph: ir.Graph, node: ir.Node, nodes: Sequence[ir.Node]) -> None:
    """Replace a node by others; the last of them produce its values, one each.

    Args:
        graph: The graph, changed in place.
        node: The node to remove.
        nodes: The nodes in its place, in an order in which they can run. The last ones have one
            output each: in order, those of `node`.
    """
    graph.insert_before(node, nodes)
    makers = nodes[-len(node.outputs) :]
    for old, (new,) in zip(node.outputs, (maker.outputs for maker in makers), strict=True):
        new.name, new.shape, new.type = old.name, old.shape, old.type
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def remove_unused(graph: ir.Graph, value: ir.Value) -> None:
    """Remove what makes a value if nothing uses it."""
    maker = value.producer()
    if maker is not None and not value.uses() and not value.is_graph_output():
        graph.remove(maker, safe=True)


def constant_values(value: ir.Value | None) -> np.ndarray[Any, Any]:
    """Return the values of a constant."""
    if value is None or value.const_value is None:
        raise GdfqError("the quantization constants must be known at export; one is computed.")
    return value.const_value.numpy()
