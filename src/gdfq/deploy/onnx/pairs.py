"""Rules for ONNX files of pairs: what runtimes that read quantization from them demand.

A runtime for another device finds the quantization of a network in pairs of QuantizeLinear and
DequantizeLinear, and computes what lies between two pairs in integers. These rules are checked in a
written file, because the runtime itself may not be here.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
_WEIGHT_AXES = {"Conv": 0, "ConvTranspose": 1, "MatMul": -1}
"""The dimension of a layer's weight that holds its output channels."""


@dataclass(frozen=True, eq=False)
class QuantizedGraph:
    """The graph of an ONNX file, with what the rules ask."""

    graph: Any
    """The `onnx.GraphProto`."""
    opset: int

    @classmethod
    def of(cls, data: bytes) -> "QuantizedGraph":
        """Read the contents of a file."""
        import onnx

        model = onnx.load_from_string(data)
        (opset,) = (entry.version for entry in model.opset_import if not entry.domain)
        return cls(model.graph, opset)

    @cached_property
    def constants(self) -> Mapping[str, Array]:
        """The initializers by name."""
        import onnx

        return {value.name: onnx.numpy_helper.to_array(value) for value in self.graph.initializer}

    @cached_property
    def makers(self) -> Mapping[str, Any]:
        """The node that computes a value, by the value's name."""
        return {name: node for node in self.graph.node for name in node.output}

    @cached_property
    def readers(self) -> Mapping[str, Sequence[tuple[Any, int]]]:
        """The nodes that read a value, each with the index of its input, by the value's name."""
        found: dict[str, list[tuple[Any, int]]] = {}
        for node in self.graph.node:
            for index, name in enumerate(node.input):
                found.setdefault(name, []).append((node, index))
        return found

    @property
    def outputs(self) -> set[str]:
        return {value.name for value in self.graph.output}

    def nodes(self, kind: str) -> list[Any]:
        return [node for node in self.graph.node if node.op_type == kind]


Rule = Callable[[QuantizedGraph], Iterator[str]]
"""Yields what of a graph breaks the rule, each as a text with the name of a value."""


def broken(rules: Sequence[Rule], data: bytes) -> list[str]:
    """Return what of a file's contents breaks the rules; empty if nothing does."""
    graph = QuantizedGraph.of(data)
    return [text for rule in rules for text in rule(graph)]


def codes_are_only_dequantized(graph: QuantizedGraph) -> Iterator[str]:
    """Every QuantizeLinear is read by DequantizeLinear alone, on its own grid."""
    for node in graph.nodes("QuantizeLinear"):
        (codes,) = node.output
        if codes in graph.outputs:
            yield f"{codes}: codes are an output"
        for reader, index in graph.readers.get(codes, ()):
            if reader.op_type != "DequantizeLinear" or index != 0:
                yield f"{codes}: {reader.op_type} reads codes"
            elif list(reader.input[1:]) != list(node.input[1:]):
                yield f"{codes}: it is dequantized on another grid"


def activations_have_one_grid(kind: type[np.generic]) -> Rule:
    """Return the rule that codes of activations have a type, a constant scale and zero point."""

    def rule(graph: QuantizedGraph) -> Iterator[str]:
        for node in graph.nodes("QuantizeLinear"):
            name = node.output[0]
            found = [graph.constants.get(value) for value in node.input[1:]]
            if len(found) != 2 or any(constant is None for constant in found):
                yield f"{name}: scale and zero point are not constants"
                continue
            scale, zero_point = found
            assert scale is not None
            assert zero_point is not None
            if scale.dtype != np.float32 or scale.size != 1 or not scale > 0:
                yield f"{name}: the scale is not one positive number"
            if zero_point.dtype != kind or zero_point.size != 1:
                yield f"{name}: codes are {zero_point.dtype}"

    return rule


def all_zero_points_are_zero(graph: QuantizedGraph) -> Iterator[str]:
    for node in (*graph.nodes("QuantizeLinear"), *graph.nodes("DequantizeLinear")):
        if len(node.input) > 2 and graph.constants[node.input[2]].any():
            yield f"{node.output[0]}: the zero point is not 0"


def weights_are_int8(graph: QuantizedGraph) -> Iterator[str]:
    """A dequantized constant is an INT8 weight of zero points 0, or an INT32 bias.

    The weight enters a layer, with one scale for each output channel or one for all.
    """
    for node in graph.nodes("DequantizeLinear"):
        name, codes = node.output[0], graph.constants.get(node.input[0])
        if codes is None:
            maker = graph.makers.get(node.input[0])
            if maker is None or maker.op_type != "QuantizeLinear":
                yield f"{name}: it dequantizes neither QuantizeLinear nor a constant"
            continue
        readers = graph.readers.get(name, ())
        if codes.dtype == np.int32 and all(index == 2 for _, index in readers):
            continue
        if codes.dtype != np.int8:
            yield f"{name}: a constant has codes of {codes.dtype}"
        if len(node.input) < 3 or graph.constants[node.input[2]].any():
            yield f"{name}: a weight needs zero points of 0"
        by_channel = graph.constants[node.input[1]].ndim > 0
        for reader, axis in _layers(graph, name, _axis(node) % codes.ndim, codes.ndim):
            expected = _channels(reader, codes.ndim)
            if expected is None:
                yield f"{name}: {reader.op_type} reads a weight"
            elif by_channel and axis != expected % codes.ndim:
                yield f"{name}: scales lie along axis {axis} of the weight of {reader.op_type}"


def _layers(graph: QuantizedGraph, name: str, axis: int, rank: int) -> Iterator[tuple[Any, int]]:
    """Yield the readers of a weight, also transposed, each with the axis of its scales there."""
    for reader, _ in graph.readers.get(name, ()):
        if reader.op_type != "Transpose":
            yield reader, axis
            continue
        order = list(_attribute(reader, "perm", range(rank)[::-1]))
        yield from _layers(graph, reader.output[0], order.index(axis), rank)


def _channels(reader: Any, rank: int) -> int | None:
    """Return the dimension of a layer's weight with its output channels; None for no layer."""
    if reader.op_type == "Gemm":
        return 0 if _attribute(reader, "transB", 0) else rank - 1
    return _WEIGHT_AXES.get(reader.op_type)


def _axis(node: Any) -> int:
    axis: int = _attribute(node, "axis", 1)
    return axis


def _attribute(node: Any, name: str, default: Any) -> Any:
    import onnx

    for attribute in node.attribute:
        if attribute.name == name:
            return onnx.helper.get_attribute_value(attribute)
    return default


def biases_are_float(graph: QuantizedGraph) -> Iterator[str]:
    for node in graph.nodes("DequantizeLinear"):
        constant = graph.constants.get(node.input[0])
        if constant is not None and constant.dtype == np.int32:
            yield f"{node.output[0]}: the bias is not float"


def constants_need_no_cast(graph: QuantizedGraph) -> Iterator[str]:
    """No constant is computed by Cast, as packed weights are."""
    for node in graph.nodes("Cast"):
        if node.input[0] in graph.constants:
            yield f"{node.output[0]}: a constant is cast"


def layers_read_quantized_weights_and_inputs(graph: QuantizedGraph) -> Iterator[str]:
    """The input of a layer with a quantized weight comes from a DequantizeLinear."""
    for node in graph.graph.node:
        if node.op_type not in {*_WEIGHT_AXES, "Gemm"} or not _is_dequantized(graph, node.input[1]):
            continue
        if not _is_dequantized(graph, node.input[0]):
            yield f"{node.output[0]}: the input of a quantized layer is not dequantized"


def _is_dequantized(graph: QuantizedGraph, name: str) -> bool:
    maker = graph.makers.get(name)
    while maker is not None and maker.op_type == "Transpose":
        maker = graph.makers.get(maker.input[0])
    return maker is not None and maker.op_type == "DequantizeLinear"


def opset_is_between(first: int, last: int) -> Rule:
    def rule(graph: QuantizedGraph) -> Iterator[str]:
        if not first <= graph.opset <= last:
            yield f"the opset is {graph.opset}"

    return rule


def biases_count_in_products(graph: QuantizedGraph) -> Iterator[str]:
    """An INT32 bias has the scales of the layer's input times those of its weight."""
    for node in graph.nodes("DequantizeLinear"):
        constant = graph.constants.get(node.input[0])
        if constant is None or constant.dtype != np.int32:
            continue
        for reader, _ in graph.readers.get(node.output[0], ()):
            sources = [graph.makers.get(name) for name in reader.input[:2]]
            if any(maker is None or maker.op_type != "DequantizeLinear" for maker in sources):
                yield f"{node.output[0]}: the bias of a layer that is not quantized is not float"
                continue
            x, weight = (graph.constants[maker.input[1]] for maker in sources if maker)
            if not np.allclose(graph.constants[node.input[1]], x * weight, rtol=1e-5, atol=0):
                yield f"{node.output[0]}: the bias has other scales than the products"


def moves_keep_their_grid(graph: QuantizedGraph) -> Iterator[str]:
    """What only moves dequantized values is quantized on their grid, unless it is an output."""
    for node in graph.graph.node:
        maker = graph.makers.get(node.input[0]) if node.input else None
        if node.op_type not in _MOVES or maker is None or maker.op_type != "DequantizeLinear":
            continue
        if maker.input[0] in graph.constants:
            continue  # a weight
        for name in node.output:
            for reader, _ in graph.readers.get(name, ()):
                if list(reader.input[1:]) != list(maker.input[1:]):
                    yield f"{name}: {reader.op_type} reads values that were moved and not quantized"


_MOVES = frozenset({"DepthToSpace", "Flatten", "MaxPool", "Reshape", "SpaceToDepth", "Transpose"})
