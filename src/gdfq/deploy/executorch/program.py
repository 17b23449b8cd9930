"""An integer network in PT2E form: floats between pairs of quantize and dequantize.

Partitioners of ExecuTorch read this form and compute each operator between such pairs in integers.
Codes are stored as in `.tflite` files (`gdfq.deploy.litert.carriers`): int8, of k < 8 bits the
highest 2^k, so that they saturate at the highest code by themselves. Numbers below the lowest are
clipped in front of their rounding.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers the operators of the form
from torch import Tensor, fx

from gdfq.deploy.litert.carriers import HIGHEST, StoredCodes, carrier_of
from gdfq.deploy.litert.shapes import values_by_node
from gdfq.graph import operators, queries
from gdfq.graph.inputs import InputSpec
from gdfq.graph.operators import name_of
from gdfq.student.integer_form import counts_in_products, quantized_by
from gdfq.student.integer_network import IntegerLayer, IntegerNetwork, IntegerWeight

LOWEST = -HIGHEST - 1
"""The lowest int8 number."""
_QDQ: Any = torch.ops.quantized_decomposed
_ATEN: Any = torch.ops.aten
_FUSED = frozenset(
    map(operators.resolve, operators.WEIGHTED | operators.SUMS | operators.ELEMENTWISE_PRODUCTS)
)
"""Operators that a ReLU behind them is part of."""


def pairs_of(
    network: IntegerNetwork, inputs: Sequence[InputSpec], *, with_codes: bool = False
) -> fx.GraphModule:
    """Return an integer network in PT2E form.

    Args:
        network: The integer network, on the CPU.
        inputs: Specifications of its inputs.
        with_codes: Whether the stored codes of all activations are returned behind the outputs, in
            the order of `network.activations`.
    """
    return _Writer(network, inputs).run(with_codes)


class _Writer:
    """Writes the form; a tensor on a grid is held as codes, and dequantized for each reader."""

    def __init__(self, network: IntegerNetwork, inputs: Sequence[InputSpec]) -> None:
        self.known = values_by_node(network.module, inputs)
        self.source = network.graph
        self.tensors = network.tensors
        self.graph = fx.Graph()
        self.carriers = {grid.node: carrier_of(grid) for grid in network.activations}
        self.layers = {layer.node: layer for layer in network.layers}
        self.floats: dict[fx.Node, Any] = {}
        self.codes: dict[fx.Node, tuple[fx.Node, StoredCodes]] = {}
        self.constants = network.constants
        self.stored: dict[str, Tensor] = {}

    def run(self, with_codes: bool) -> fx.GraphModule:
        written: set[fx.Node] = set()
        for node in self.source.nodes:
            if node in written or node in self.constants or node.op == "output":
                continue
            if node in self.carriers:
                self._round(node, self._float(queries.input_of(node)))
            elif chain := quantized_by(node, self.tensors):
                written |= set(chain)
                self._round(chain[-1], self._computed(node, self.carriers[chain[-1]]))
            else:
                if name_of(node) in operators.DIVISIONS:
                    continue  # its parts are written one by one
                self.floats[node] = self._computed(node)
                self._keep_grid(node)
        outputs = [self._float(node) for node in queries.outputs(self.source)]
        codes = [self.codes[node][0] for node in self.carriers] if with_codes else []
        self.graph.output((*outputs, *codes))
        return fx.GraphModule(self.stored, self.graph)

    def _constant(self, value: Any) -> Any:
        """Return a constant as an argument of the new graph."""
        if not isinstance(value, Tensor):
            return value
        name = f"constant_{len(self.stored)}"
        # A copy in usual strides: those of channels_last would make layers return such maps, which
        # kernels outside XNNPACK do not take.
        self.stored[name] = torch.empty(value.shape, dtype=value.dtype).copy_(value.detach())
        return self.graph.get_attr(name)

    # ----------------------------------------------------------------- values

    def _float(self, node: fx.Node) -> Any:
        """Return a node's values as floats; each reader of codes dequantizes them for itself."""
        if node in self.codes:
            codes, carrier = self.codes[node]
            return self._call(_QDQ.dequantize_per_tensor.default, codes, *_grid(carrier))
        if node in self.constants:
            return self._constant(self.constants[node])
        return self.floats[node]

    def _call(self, function: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(function, args, kwargs)

    def _round(self, node: fx.Node, x: fx.Node) -> None:
        """Write the rounding of an activation."""
        carrier = self.carriers[node]
        self.codes[node] = self._rounded(x, carrier), carrier

    def _rounded(self, x: fx.Node, carrier: StoredCodes) -> fx.Node:
        if not carrier.saturates:
            x = self._clamped(x, carrier.low)
        return self._call(_QDQ.quantize_per_tensor.default, x, *_grid(carrier))

    def _clamped(self, x: fx.Node, low: float, high: float = math.inf) -> fx.Node:
        """Write a clamp.

        A ReLU is part of a layer or a sum in front of it. XNNPACK would round other ReLUs and
        clamps of codes twice, to the grid of these codes and to the next one, but not the larger of
        two numbers.
        """
        if low == 0 and high == math.inf and x.target in _FUSED:
            return self._call(_ATEN.relu.default, x)
        for end, function in ((low, _ATEN.maximum.default), (high, _ATEN.minimum.default)):
            if not math.isinf(end):
                x = self._call(function, x, self._constant(torch.tensor(end)))
        return x

    def _keep_grid(self, node: fx.Node) -> None:
        """Hold what only moves codes as codes, on their grid."""
        if not queries.keeps_grid(node) or _returns_several(node):
            return
        source = queries.grid_source(node)
        if source in self.carriers:
            carrier = self.carriers[source]
            codes = self._call(_QDQ.quantize_per_tensor.default, self.floats[node], *_grid(carrier))
            self.codes[node] = codes, carrier

    # -------------------------------------------------------------- operators

    def _computed(self, node: fx.Node, carrier: StoredCodes | None = None) -> fx.Node:
        """Write an operator on floats.

        Args:
            node: The operator.
            carrier: How its result is stored, if it is rounded and nothing else reads it.
        """
        if carrier is not None and self._is_integer(node, carrier):
            return self._integer_layer(self.layers[node])
        if queries.is_clamp(node):
            return self._clamped(self._float(queries.input_of(node)), *queries.clamp_ends(node))
        if (part := self._part(node)) is not None:
            return part
        if carrier is not None and name_of(node) in operators.JOINS:
            parts: Any = node.args[0]
            rounded = [self._rounded(self._float(part), carrier) for part in parts]
            values = [
                self._call(_QDQ.dequantize_per_tensor.default, part, *_grid(carrier))
                for part in rounded
            ]
            return self._call(node.target, values, *node.args[1:], **node.kwargs)
        return self.graph.node_copy(node, self._float)

    def _part(self, node: fx.Node) -> fx.Node | None:
        """Write one of the tensors that a node divides another into; None for other nodes.

        The runtime has no kernel that divides maps as XNNPACK leaves them.
        """
        source = node.all_input_nodes[0] if name_of(node) == operators.GETITEM else None
        if source is None or name_of(source) not in operators.DIVISIONS:
            return None
        x, index = queries.input_of(source), node.args[1]
        assert isinstance(index, int)
        dim = _dim_of_division(source)
        if name_of(source) == operators.UNBIND:
            return self._call(_ATEN.select.int, self._float(x), dim, index)
        lengths = [int(part.shape[dim]) for part in self.known[source]]
        start = sum(lengths[:index])
        return self._call(_ATEN.slice.Tensor, self._float(x), dim, start, start + lengths[index])

    def _is_integer(self, node: fx.Node, carrier: StoredCodes) -> bool:
        """Return whether XNNPACK adds the products of a node as integers."""
        layer = self.layers.get(node)
        if layer is None or layer.weight is None or layer.input is None or node.kwargs:
            return False
        bias, weight = queries.bias_of(node), layer.weight.node
        return (
            (carrier.saturates or carrier.starts_at_zero)
            and (name_of(node) not in operators.TRANSPOSED_CONVOLUTIONS or _is_ungrouped(node))
            and (bias is None or counts_in_products(bias, layer.input.node, weight, self.tensors))
        )

    def _integer_layer(self, layer: IntegerLayer) -> fx.Node:
        node, bias = layer.node, queries.bias_of(layer.node)
        assert layer.weight is not None
        x = self._float(queries.input_of(node))
        weight = self._weight(layer.weight, name_of(node) in operators.TRANSPOSED_CONVOLUTIONS)
        values = None if bias is None else self._constant(self.constants[bias])
        return self._call(node.target, x, weight, values, *node.args[3:])

    def _weight(self, weight: IntegerWeight, is_transposed: bool) -> fx.Node:
        """Write a weight: int8 codes with zero points of 0, and a scale for each channel."""
        axis = 1 if is_transposed else 0
        count = weight.codes.shape[axis]
        codes = (weight.codes.to(torch.int16) - weight.zero_point.to(torch.int16)).to(torch.int8)
        scales = weight.scale.flatten().expand(count)
        zeros = torch.zeros(count, dtype=torch.int64)
        constants = map(self._constant, (codes, scales, zeros))
        bounds = axis, LOWEST, HIGHEST, torch.int8
        return self._call(_QDQ.dequantize_per_channel.default, *constants, *bounds)


def _grid(carrier: StoredCodes) -> tuple[float, int, int, int, torch.dtype]:
    """Return the arguments of quantize and dequantize after the tensor."""
    return carrier.scale, carrier.grid.zero_point, LOWEST, HIGHEST, torch.int8


def _is_ungrouped(node: fx.Node) -> bool:
    return queries.group_count(node) == 1


def _dim_of_division(node: fx.Node) -> int:
    index = 1 if name_of(node) == operators.UNBIND else 2
    dim = node.args[index] if len(node.args) > index else node.kwargs.get("dim", 0)
    assert isinstance(dim, int)
    return dim


def _returns_several(node: fx.Node) -> bool:
    return queries.has_several_outputs(node) and name_of(node) != operators.GETITEM
