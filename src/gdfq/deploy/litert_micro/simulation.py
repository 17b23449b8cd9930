"""The integer network as TFLite Micro's kernels compute it, with their two roundings.

A file for TFLite Micro is compared with it code by code, and all must be the same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from gdfq.deploy.litert.integers import ARITHMETIC
from gdfq.deploy.litert.windows import Windows
from gdfq.deploy.litert_micro.arithmetic import (
    ONE,
    headroom,
    layer_factors,
    mean_scale,
    windows_of_average,
)
from gdfq.functional.gemmlowp import requantized, requantized_sum
from gdfq.functional.integer import offset_bounds, rounded, steps_of
from gdfq.graph import operators, queries
from gdfq.graph.operators import name_of, short_name
from gdfq.student.integer_form import quantized_by
from gdfq.student.integer_network import ActivationGrid, IntegerLayer, IntegerNetwork


@dataclass(frozen=True, eq=False)
class Simulated:
    """What a network computes: whole numbers u = q − z, in float64.

    Attributes:
        codes: u of each activation, by the name of its grid.
        outputs: u of each output, in order.
    """

    codes: Mapping[str, Tensor]
    outputs: Sequence[Tensor]


@torch.no_grad()
def simulated(network: IntegerNetwork, inputs: Sequence[Tensor]) -> Simulated:
    """Return the codes that TFLite Micro computes.

    Args:
        network: An integer network whose inputs and outputs are on grids, and which a file for
            TFLite Micro can hold.
        inputs: A tensor [N, *shape] for each input.

    Raises:
        OverflowError: A sum leaves int32.
    """
    return _Simulation(network).run(inputs)


class _Simulation:
    """Walks through the graph; tensors on a grid are held as u, whole numbers in float64."""

    def __init__(self, network: IntegerNetwork) -> None:
        self.graph = network.graph
        self.tensors = network.tensors
        self.grids = {grid.node: grid for grid in network.activations}
        self.layers = {layer.node: layer for layer in network.layers}
        self.values: dict[fx.Node, Any] = {}
        self.found: dict[str, Tensor] = {}

    def run(self, inputs: Sequence[Tensor]) -> Simulated:
        given = iter(inputs)
        rounded_already: set[fx.Node] = set()
        for node in self.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = next(given)
            elif node.op == "get_attr":
                self.values[node] = self.tensors[str(node.target)]
            elif node.op == "output" or node in rounded_already:
                continue
            elif node in self.grids:
                self._round(node, self._requantized(queries.input_of(node), self.grids[node]))
            elif name_of(node) in operators.QUANTIZATION:
                continue  # a weight or bias, which the layer reads as codes
            elif chain := quantized_by(node, self.tensors):
                grid = self.grids[chain[-1]]
                if (steps := self._steps(node, grid)) is not None:
                    rounded_already |= set(chain)
                    self._round(chain[-1], steps)
                else:
                    self.values[node] = self._moved(node)
            else:
                self.values[node] = self._moved(node)
        outputs = [self.values[node] for node in queries.outputs(self.graph)]
        return Simulated(self.found, outputs)

    def _round(self, quantizer: fx.Node, steps: Tensor) -> None:
        """Keep the codes of an activation, given in units of its scale."""
        grid = self.grids[quantizer]
        u = steps.double().clamp(*offset_bounds(grid.zero_point, grid.bits))
        self.values[quantizer] = self.found[grid.name] = u

    def _grid(self, node: fx.Node) -> ActivationGrid:
        return self.grids[queries.grid_source(node)]

    def _requantized(self, source: fx.Node, grid: ActivationGrid) -> Tensor:
        """Return a tensor in units of another grid; inputs are rounded once."""
        if source.op == "placeholder":
            bounds = offset_bounds(grid.zero_point, grid.bits)
            return rounded(steps_of(self.values[source], grid.scale), *bounds)
        own, u = float(self._grid(source).scale), self.values[source].long()
        return requantized_sum(u, torch.zeros_like(u), (own, own), float(grid.scale))

    def _steps(self, node: fx.Node, grid: ActivationGrid) -> Tensor | None:
        """Return what an operator computes in units of a grid; None if it only moves codes."""
        if node in self.layers:
            return self._layer(self.layers[node], grid)
        if name_of(node) in operators.JOINS:
            parts = [self._requantized(part, grid) for part in node.all_input_nodes]
            function: Any = node.target
            joined: Tensor = function(parts, *node.args[1:], **node.kwargs)
            return joined
        terms = [arg for arg in node.args if isinstance(arg, fx.Node)]
        if short_name(node) in ARITHMETIC:
            return self._arithmetic(node, terms, grid)
        (x, *_) = terms
        average = windows_of_average(node, tuple(self.values[x].shape))
        return None if average is None else self._average(node, *average, grid)

    def _layer(self, layer: IntegerLayer, grid: ActivationGrid) -> Tensor:
        node, larger = layer.node, headroom(layer)
        assert layer.weight is not None
        weight = (layer.weight.codes.double() - layer.weight.zero_point) * larger
        function: Any = node.target
        u = self.values[queries.input_of(node)]
        sums = function(u, weight, None, *queries.options_of(node))
        dim = queries.channel_dim(node)
        if layer.bias is not None:
            shape = [1] * sums.ndim
            shape[dim] = -1
            sums = sums + (layer.bias.double() * larger).view(shape)
        return requantized(sums.long(), layer_factors(layer, grid.scale), dim)

    def _arithmetic(self, node: fx.Node, terms: list[fx.Node], grid: ActivationGrid) -> Tensor:
        x, y = (self.values[term].long() for term in terms)
        own, other = (float(self._grid(term).scale) for term in terms)
        if name_of(node) in operators.ELEMENTWISE_PRODUCTS:
            return requantized(x * y, own * other / float(grid.scale))
        sign = -1 if name_of(node) == operators.DIFFERENCE else 1
        return requantized_sum(x, y, (own, other), float(grid.scale), sign)

    def _average(
        self, node: fx.Node, windows: Windows, count: float, grid: ActivationGrid
    ) -> Tensor:
        x = queries.input_of(node)
        u = self.values[x]
        sums = _window_sums(u, windows)
        factor = float(self._grid(x).scale) * mean_scale(count) / float(grid.scale)
        function: Any = node.target
        shape = function(u, *node.args[1:], **node.kwargs).shape
        return requantized(ONE * sums.reshape(shape).long(), factor)

    def _moved(self, node: fx.Node) -> Any:
        function: Any = node.target
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.values.__getitem__)
        return function(*args, **kwargs)


def _window_sums(u: Tensor, windows: Windows) -> Tensor:
    """Return the sums of windows over the positions of a map, [N, C, *counts]."""
    maps = u.reshape(*u.shape[:2], *windows.sides)
    (top, bottom), (left, right) = windows.pads
    rows, columns = (
        max(0, (count - 1) * step + extent - side - before - after)
        for count, step, extent, side, (before, after) in zip(
            windows.counts,
            windows.stride,
            windows.extents,
            windows.sides,
            windows.pads,
            strict=True,
        )
    )  # what a last window reads beyond the border
    bordered = F.pad(maps, (left, right + columns, top, bottom + rows))
    kernel = torch.ones(u.shape[1], 1, *windows.kernel, dtype=u.dtype)
    return F.conv2d(bordered, kernel, None, windows.stride, groups=u.shape[1])
