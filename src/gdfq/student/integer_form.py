"""The integer form of a frozen student: it adds whole numbers, as integer runtimes do.

The graph of an `IntegerNetwork` says what is computed in real numbers. Two ways to compute that in
floats differ by the rounding of sums, which moves a few codes by one; a deep network amplifies
them. In the integer form (`gdfq.functional.integer`) the sums of layers and of means are exact and
each is rounded once, so that the order of summation does not matter, and a runtime with integer
kernels gives the same codes.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from gdfq.functional import integer
from gdfq.functional.grid import Layout, clips_alike
from gdfq.graph import operators, queries

SCALE = "scale"
"""Where the metadata of a node that rounds an activation names the constant of its scale."""
_ONE_OUTPUT = operators.GRID_PRESERVING - operators.SEVERAL_OUTPUTS


def integer_form(source: fx.Graph, tensors: Mapping[str, Tensor]) -> fx.Graph:
    """Return a graph that computes the same from the same tensors, layers and means in integers.

    Layers stay float whose weight or input is float, and transposed convolutions, which integer
    runtimes compute in floats.

    Args:
        source: The graph of an integer network.
        tensors: Its tensors by name.
    """
    return _IntegerForm(source, tensors).graph


class _IntegerForm:
    """Writes the integer form; a tensor on a grid is held as u = q − z, and as floats on demand."""

    def __init__(self, source: fx.Graph, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.graph = fx.Graph()
        self.floats: dict[fx.Node, fx.Node] = {}
        self.offsets: dict[fx.Node, fx.Node] = {}
        fused: set[fx.Node] = set()
        for node in source.nodes:
            if node in fused or node.op == "get_attr":
                continue
            if operators.name_of(node) == operators.FAKE_QUANTIZE:
                x, scale, *_ = node.args
                self._round(node, self._call(integer.steps_of, self._float(x), scale))
            elif is_integer_layer(node, tensors):
                sums = self._sums(node)
                chain = quantized_by(node, tensors)
                if chain:
                    fused |= set(chain)
                    scale = chain[-1].args[1]
                    steps = self._call(integer.in_steps, sums, *self._scales(node), scale)
                    self._round(chain[-1], steps)
                else:
                    self.floats[node] = self._call(integer.rescaled, sums, *self._scales(node))
            elif self._is_mean_of_offsets(node) and (chain := quantized_by(node, tensors)):
                fused |= set(chain)
                self._round(chain[-1], self._mean(node, chain[-1].args[1]))
            elif self._moves_offsets(node):
                self.offsets[node] = self._moved(node, node.all_input_nodes[0])
            else:
                self.floats[node] = self.graph.node_copy(node, self._float)
        self.graph.eliminate_dead_code(lambda node: node.op in {"placeholder", "output"})

    def _round(self, quantizer: fx.Node, steps: fx.Node) -> None:
        """Write the rounding of an activation, given in units of its scale."""
        new = self._call(integer.rounded, steps, *self._bounds(quantizer))
        scale = quantizer.args[1]
        assert isinstance(scale, fx.Node)
        new.meta[SCALE] = str(scale.target)
        self.offsets[quantizer] = new

    def _bounds(self, quantizer: fx.Node) -> tuple[float, float]:
        """Return the lowest and the highest u of an activation."""
        _, _, zero_point, bits = quantizer.args
        assert isinstance(bits, int)
        return integer.offset_bounds(_tensor(zero_point, self.tensors), bits)

    def _call(self, function: Any, *arguments: Any) -> fx.Node:
        def mapped(node: fx.Node) -> fx.Node:
            return node if node.graph is self.graph else self._float(node)

        return self.graph.call_function(function, fx.node.map_arg(arguments, mapped))

    def _float(self, node: Any) -> fx.Node:
        """Return the node's values as floats; constants are copied where they are first used."""
        if node not in self.floats and node.op == "get_attr":
            self.floats[node] = self.graph.node_copy(node)
        elif node not in self.floats:
            scale = queries.grid_source(node).args[1]
            assert isinstance(scale, fx.Node)
            self.floats[node] = self._call(integer.values, self.offsets[node], scale)
        return self.floats[node]

    def _moved(self, node: fx.Node, first: fx.Node) -> fx.Node:
        """Copy a node that moves values, to move offsets instead."""

        def mapped(source: fx.Node) -> fx.Node:
            return self.offsets[source] if source is first else self._float(source)

        return self.graph.node_copy(node, mapped)

    def _moves_offsets(self, node: fx.Node) -> bool:
        """Return whether a node moves values of a grid and nothing else."""
        if operators.name_of(node) not in _ONE_OUTPUT or not queries.keeps_grid(node):
            return False
        return node.all_input_nodes[0] in self.offsets

    def _is_mean_of_offsets(self, node: fx.Node) -> bool:
        return queries.mean_of(node) is not None and queries.input_of(node) in self.offsets

    def _mean(self, node: fx.Node, scale: Any) -> fx.Node:
        """Write a mean of values on a grid, given in units of a scale."""
        mean = queries.mean_of(node)
        assert mean is not None
        x = queries.input_of(node)
        input_scale = queries.grid_source(x).args[1]
        return self._call(integer.mean_in_steps, self.offsets[x], *mean, input_scale, scale)

    def _largest(self, node: fx.Node) -> float:
        """Return the largest |u| of a layer's input."""
        return max(map(abs, self._bounds(queries.grid_source(queries.input_of(node)))))

    def _parts(self, node: fx.Node) -> int:
        codes, _, zero_point, _ = queries.weight_of(node).args
        return integer.exact_parts(
            _tensor(codes, self.tensors),
            _tensor(zero_point, self.tensors),
            self._largest(node),
            queries.group_count(node),
        )

    def _sums(self, node: fx.Node) -> fx.Node:
        """Write a = Σ u v + c of a layer."""
        x = queries.input_of(node)
        codes, _, zero_point, _ = queries.weight_of(node).args
        bias = queries.bias_of(node)
        if x in self.offsets:
            u = self.offsets[x]
        else:  # one of several outputs
            source = queries.grid_source(x)
            steps = self._call(integer.steps_of, x, source.args[1])
            u = self._call(integer.rounded, steps, *self._bounds(source))
        options = queries.options_of(node)
        sums = self._call(
            integer.products, node.target, self._parts(node), u, codes, zero_point, *options
        )
        if bias is None:
            return self._call(torch.Tensor.float, sums)
        stored = bias.args[0]
        exact = integer.is_exact(_tensor(stored, self.tensors))
        return self._call(integer.with_bias, sums, stored, queries.channel_dim(node), exact)

    def _scales(self, node: fx.Node) -> tuple[Any, Any, int]:
        """Return the scales of a layer's input and weight, and the dimension of its channels."""
        source = queries.grid_source(queries.input_of(node))
        return source.args[1], queries.weight_of(node).args[1], queries.channel_dim(node)


def is_integer_layer(node: fx.Node, tensors: Mapping[str, Tensor]) -> bool:
    """Return whether a node is a layer whose products are added as whole numbers.

    Args:
        node: A node of an integer network.
        tensors: The tensors of the network by name.
    """
    if not queries.is_layer(node) or node.kwargs:
        return False
    weight, bias = queries.weight_of(node), queries.bias_of(node)
    source = queries.grid_source(queries.input_of(node))
    return (
        operators.name_of(weight) == operators.DEQUANTIZE
        and operators.name_of(source) == operators.FAKE_QUANTIZE
        and (bias is None or counts_in_products(bias, source, weight, tensors))
        and queries.weight_layout(node)[0] is Layout.ROWS
    )


def counts_in_products(
    bias: fx.Node, source: fx.Node, weight: fx.Node, tensors: Mapping[str, Tensor]
) -> bool:
    """Return whether a bias counts in units of the scales of the layer's input and weight."""
    if operators.name_of(bias) != operators.DEQUANTIZE_BIAS:
        return False
    pairs = zip(bias.args[1:], (source.args[1], weight.args[1]), strict=True)
    return all(_tensor(own, tensors) is _tensor(other, tensors) for own, other in pairs)


def quantized_by(node: fx.Node, tensors: Mapping[str, Tensor]) -> list[fx.Node]:
    """Return the nodes from after a node to the quantizer that alone reads it, or none.

    Clamps in between must clip as the grid does.
    """
    chain: list[fx.Node] = []
    while len(node.users) == 1:
        (node,) = node.users
        chain.append(node)
        if operators.name_of(node) == operators.FAKE_QUANTIZE:
            _, scale, zero_point, bits = node.args
            assert isinstance(bits, int)
            grid = _tensor(scale, tensors), _tensor(zero_point, tensors), bits
            limits = map(queries.clamp_ends, chain[:-1])
            return chain if all(clips_alike(ends, *grid) for ends in limits) else []
        if not queries.is_clamp(node):
            return []
    return []


def _tensor(node: Any, tensors: Mapping[str, Tensor]) -> Tensor:
    return tensors[str(node.target)]
