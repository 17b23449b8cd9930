"""Operators of a new opset written in the lowest opset that has them, from 13 on.

Opset 13 is the first one with a scale for each channel in DequantizeLinear. Operators that came
later, and have an equal form of older ones, are written in that; others decide the opset.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from gdfq.deploy.onnx.passes import DOMAIN, constant_values, inputs_of, replace_node
from gdfq.errors import UsageError

LOWEST, HIGHEST = 13, 19
"""Opsets of these files; ONNX Runtime 1.16 reads up to 19."""
_AXES_ARE_INPUTS = 18
"""From this opset on reductions have their axes as an input, and Split has a number of outputs."""
_PAD_WRAPS = 19
"""From this opset on Pad can repeat a tensor."""
_IR_VERSIONS = ((19, 9), (15, 8), (0, 7))
"""The version of the file format that came with an opset, from that opset on."""


def lower(model: ir.Model) -> None:
    """Write a model in the lowest opset from 13 on that has its operators.

    Raises:
        UsageError: An operator needs a newer opset than ONNX Runtime 1.16 reads.
    """
    graph = model.graph
    for node in list(graph):
        if node.op_type in _EQUAL_FORMS:
            replace_node(graph, node, _EQUAL_FORMS[node.op_type](graph, node))
    nodes = [node for node in graph if node.domain != DOMAIN]
    opset = max(map(_opset_of, nodes), default=LOWEST)
    for node in nodes:
        _write_older(graph, node, opset)
    model.opset_imports[""] = opset
    model.ir_version = next(version for first, version in _IR_VERSIONS if opset >= first)


def _opset_of(node: ir.Node) -> int:
    """Return the lowest opset from 13 on that can hold a node."""
    name = node.op_type
    if name == "Pad" and _text(node, "mode") == "wrap":
        return _PAD_WRAPS
    if name == "Resize" and _number_of(node, "antialias", 0):
        return _AXES_ARE_INPUTS
    for opset in range(LOWEST, HIGHEST + 1):
        if _exists(name, opset):
            return opset
    raise UsageError(
        f"ONNX Runtime 1.16 reads opsets up to {HIGHEST}, and {name} is newer. Export with "
        "--target onnx instead."
    )


def _exists(name: str, opset: int) -> bool:
    import onnx

    try:
        onnx.defs.get_schema(name, opset)
    except onnx.defs.SchemaError:
        return False
    return True


def _number_of(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


def _text(node: ir.Node, name: str) -> str:
    attribute = node.attributes.get(name)
    return "" if attribute is None else attribute.as_string()


def _write_older(graph: ir.Graph, node: ir.Node, opset: int) -> None:
    """Replace attributes and inputs of a node that came after an opset."""
    name, attributes = node.op_type, node.attributes
    if name == "Reshape":
        # Only an empty batch would have a 0, and a network takes none.
        attributes.pop("allowzero", None)
    if name in {"LSTM", "GRU", "RNN"}:
        attributes.pop("layout", None)  # 0, as torch.onnx writes it
    if name == "GridSample":
        mode = {"linear": "bilinear", "cubic": "bicubic"}.get(_text(node, "mode"))
        if mode is not None:
            attributes["mode"] = ir.AttrString("mode", mode)
    if opset >= _AXES_ARE_INPUTS:
        return
    if name == "Resize":
        for newer in ("antialias", "keep_aspect_ratio_policy"):
            attributes.pop(newer, None)
    if name == "Split" and attributes.pop("num_outputs", None) is not None:
        _give_sizes(graph, node)
    if name.startswith("Reduce") and name != "ReduceSum":
        attributes.pop("noop_with_empty_axes", None)
        if len(node.inputs) > 1:
            axes = constant_values(node.inputs[1]).reshape(-1).tolist()
            attributes["axes"] = ir.AttrInt64s("axes", axes)
            node.resize_inputs(1)


def _give_sizes(graph: ir.Graph, node: ir.Node) -> None:
    """Give a Split the sizes of its outputs, the last of which may be smaller."""
    (x,) = inputs_of(node)
    axis = _number_of(node, "axis", 0)
    whole, count = int(x.shape[axis]), len(node.outputs)
    size = -(-whole // count)
    sizes = [min(size, whole - i * size) for i in range(count)]
    node.resize_inputs(2)
    node.replace_input_with(1, _constant(graph, "split", np.array(sizes, np.int64)))


def _constant(graph: ir.Graph, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
    """Return a new initializer, or the one of the same value."""
    unique, count = name, 0
    while (known := graph.initializers.get(unique)) is not None:
        old = constant_values(known)
        if old.dtype == array.dtype and np.array_equal(old, array):
            return known
        count += 1
        unique = f"{name}_{count}"
    value = ir.Value(name=unique, const_value=ir.tensor(array, name=unique))
    graph.register_initializer(value)
    return value


# ----------------------------------------------------------------------------- equal forms


def _shape(graph: ir.Graph, node: ir.Node) -> list[ir.Node]:
    """Shape with a range of dimensions (15): a slice of the whole shape."""
    bounds = _number_of(node, "start", 0), _number_of(node, "end", 2**31 - 1)
    shape = ir.node("Shape", [node.inputs[0]])
    ends = [_constant(graph, f"dimension.{bound}", np.array([bound], np.int64)) for bound in bounds]
    return [shape, ir.node("Slice", [shape.outputs[0], *ends])]


def _hard_swish(_: ir.Graph, node: ir.Node) -> list[ir.Node]:
    """HardSwish (14): x max(0, min(1, x / 6 + 1/2))."""
    gate = ir.node("HardSigmoid", [node.inputs[0]], {"alpha": 1 / 6, "beta": 0.5})
    return [gate, ir.node("Mul", [node.inputs[0], gate.outputs[0]])]


def _mish(_: ir.Graph, node: ir.Node) -> list[ir.Node]:
    """Mish (18): x tanh(softplus(x))."""
    soft = ir.node("Softplus", [node.inputs[0]])
    gate = ir.node("Tanh", [soft.outputs[0]])
    return [soft, gate, ir.node("Mul", [node.inputs[0], gate.outputs[0]])]


def _number(graph: ir.Graph, value: float) -> ir.Value:
    return _constant(graph, f"number.{value:.6g}", np.array(value, np.float32))


def _gelu(graph: ir.Graph, node: ir.Node) -> list[ir.Node]:
    """Gelu (20): x (1 + erf(x / √2)) / 2, or its approximation by tanh."""
    x, half, one = node.inputs[0], _number(graph, 0.5), _number(graph, 1.0)
    if _text(node, "approximate") == "tanh":  # x + 0.044715 x³ = x (1 + 0.044715 x²)
        square = ir.node("Mul", [x, x])
        part = ir.node("Mul", [square.outputs[0], _number(graph, 0.044715)])
        factor = ir.node("Add", [part.outputs[0], one])
        cubic = ir.node("Mul", [x, factor.outputs[0]])
        inner = ir.node("Mul", [cubic.outputs[0], _number(graph, float(np.sqrt(2 / np.pi)))])
        nodes = [square, part, factor, cubic, inner, ir.node("Tanh", [inner.outputs[0]])]
    else:
        inner = ir.node("Div", [x, _number(graph, float(np.sqrt(2)))])
        nodes = [inner, ir.node("Erf", [inner.outputs[0]])]
    gate = ir.node("Add", [nodes[-1].outputs[0], one])
    whole = ir.node("Mul", [x, gate.outputs[0]])
    return [*nodes, gate, whole, ir.node("Mul", [whole.outputs[0], half])]


def _layer_norm(graph: ir.Graph, node: ir.Node) -> list[ir.Node]:
    """LayerNormalization (17): (x − mean) / √(variance + ε), times scale, plus bias."""
    x, scale, *biases = inputs_of(node)
    axis = _number_of(node, "axis", -1)
    rank = x.shape.rank()
    # As of the newest opset; `_write_older` writes it for an older one.
    axes = _constant(graph, "axes", np.arange(axis % rank, rank, dtype=np.int64))
    mean = ir.node("ReduceMean", [x, axes])
    centred = ir.node("Sub", [x, mean.outputs[0]])
    # ONNX Runtime recognises a square as Pow.
    square = ir.node("Pow", [centred.outputs[0], _number(graph, 2.0)])
    variance = ir.node("ReduceMean", [square.outputs[0], axes])
    shifted = ir.node("Add", [variance.outputs[0], _number(graph, _epsilon(node))])
    deviation = ir.node("Sqrt", [shifted.outputs[0]])
    unit = ir.node("Div", [centred.outputs[0], deviation.outputs[0]])
    scaled = ir.node("Mul", [unit.outputs[0], scale])
    nodes = [mean, centred, square, variance, shifted, deviation, unit, scaled]
    given = [bias for bias in biases if bias is not None]
    return [*nodes, *(ir.node("Add", [scaled.outputs[0], bias]) for bias in given)]


def _epsilon(node: ir.Node) -> float:
    return node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5


def _group_norm(graph: ir.Graph, node: ir.Node) -> list[ir.Node]:
    """GroupNormalization (21): InstanceNormalization of the groups, then scale and bias."""
    x, scale, bias = inputs_of(node)
    groups, rank = node.attributes["num_groups"].as_int(), x.shape.rank()
    shape = ir.node("Shape", [x])
    by_group = _constant(graph, f"shape.{groups}", np.array([0, groups, -1], np.int64))
    flat = ir.node("Reshape", [x, by_group])
    ones, zeros = (
        _constant(graph, f"{name}.{groups}", np.full(groups, value, np.float32))
        for name, value in (("ones", 1.0), ("zeros", 0.0))
    )
    unit = ir.node(
        "InstanceNormalization", [flat.outputs[0], ones, zeros], {"epsilon": _epsilon(node)}
    )
    back = ir.node("Reshape", [unit.outputs[0], shape.outputs[0]])
    sides = np.array([-1, *[1] * (rank - 2)], np.int64)
    columns = _constant(graph, f"channels.{rank}", sides)
    factor, shift = (ir.node("Reshape", [value, columns]) for value in (scale, bias))
    scaled = ir.node("Mul", [back.outputs[0], factor.outputs[0]])
    moved = ir.node("Add", [scaled.outputs[0], shift.outputs[0]])
    return [shape, flat, unit, back, factor, shift, scaled, moved]


_EQUAL_FORMS: Mapping[str, Callable[[ir.Graph, ir.Node], list[ir.Node]]] = {
    "Gelu": _gelu,
    "GroupNormalization": _group_norm,
    "HardSwish": _hard_swish,
    "LayerNormalization": _layer_norm,
    "Mish": _mish,
    "Shape": _shape,
}
