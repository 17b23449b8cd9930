"""Operators that change no number and keep a runtime from fusing what it fuses wrongly.

OpenVINO computes some neighbours in one operation, which gives other numbers. A MaxPool of one
element between them, or Pad and Slice without positions, keeps them apart.
"""

from typing import Any

import numpy as np
import onnx_ir as ir

from gdfq.deploy.onnx.passes import LAYERS, codes_and_grid, inputs_of, remove_unused


def add_barriers(graph: ir.Graph) -> None:
    """Separate what OpenVINO fuses wrongly."""
    _before_sums(graph)
    _behind_products(graph)


def _before_sums(graph: ir.Graph) -> None:
    """Separate a layer's codes from a sum by a MaxPool of one element, which changes no code.

    OpenVINO fuses a layer, the rounding of its output, the sum that reads it, and the rounding of
    the sum into one operation, in which the first rounding is lost.
    """
    for node in list(graph):
        if node.op_type not in _SUMS:
            continue
        terms = [(value, codes_and_grid(value)) for value in inputs_of(node)]
        if any(value.is_initializer() or _is_constant(value) for value, _ in terms):
            continue
        for index, (value, found) in enumerate(terms):
            # An output with other readers is computed by itself.
            if found is None or len(value.uses()) > 1 or len(found[0].uses()) > 1:
                continue
            codes, scale, zero_point = found
            if not _comes_from_layer(codes):
                continue
            assert value.shape is not None
            barrier = _barrier(graph, codes, value.shape.rank())
            after = ir.node("DequantizeLinear", [barrier[-1].outputs[0], scale, zero_point])
            after.outputs[0].shape, after.outputs[0].type = value.shape, value.type
            graph.insert_before(node, [*barrier, after])
            node.replace_input_with(index, after.outputs[0])
            remove_unused(graph, value)


_SUMS = frozenset({"Add", "Sub"})


def _is_constant(value: ir.Value) -> bool:
    """Return whether a value is a dequantized constant, such as a 0 that is added."""
    maker = value.producer()
    first = None if maker is None else maker.inputs[0]
    return first is not None and first.is_initializer()


def _comes_from_layer(codes: ir.Value) -> bool:
    """Return whether codes are those of a layer's output, also behind a clamp."""
    node = codes.producer()
    while node is not None and node.op_type in {"QuantizeLinear", "Clip", "Relu", "Max", "Min"}:
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    return node is not None and node.op_type in LAYERS


def _behind_products(graph: ir.Graph) -> None:
    """Separate a product with a factor for each channel, one of them negative, from its rounding.

    OpenVINO moves the factors into the bounds of the rounding. If these are in falling order, and
    the rounding is not fused with a layer, it takes the first factor for all channels.
    """
    for node in list(graph):
        product = node.inputs[0] if node.op_type == "QuantizeLinear" else None
        if product is None or not _has_negative_factors(product.producer()):
            continue
        assert product.shape is not None
        if (rank := product.shape.rank()) > 2:  # without positions it is right
            barrier = _barrier(graph, product, rank)
            graph.insert_before(node, barrier)
            node.replace_input_with(0, barrier[-1].outputs[0])


def _has_negative_factors(product: ir.Node | None) -> bool:
    if product is None or product.op_type not in {"Mul", "Div"}:
        return False
    factors = (value.const_value for value in inputs_of(product))
    return any(f is not None and f.size > 1 and bool((f.numpy() < 0).any()) for f in factors)


def _barrier(graph: ir.Graph, value: ir.Value, rank: int) -> list[ir.Node]:
    """Return nodes that return a value as it is: a MaxPool, or without positions Pad and Slice."""
    if rank > 2:
        return [ir.node("MaxPool", [value], {"kernel_shape": [1] * (rank - 2)})]
    ends, one, last = (
        _register(graph, f"barrier.{name}", np.array(values, np.int64))
        for name, values in (("ends", [0, 1, 0, 0]), ("one", [1]), ("last", [2**31]))
    )
    padded = ir.node("Pad", [value, ends])
    return [padded, ir.node("Slice", [padded.outputs[0], one, last, one])]


def _register(graph: ir.Graph, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
    if name not in graph.initializers:
        graph.register_initializer(ir.Value(name=name, const_value=ir.tensor(array, name=name)))
    return graph.initializers[name]
