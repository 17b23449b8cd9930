"""Equalization of channels in the full-precision network; it does not change the function.

A positive factor passes through a ReLU, a sum or a pooling unchanged: relu(x / s) = relu(x) / s.
So a layer's output channels can be divided by factors if the input channels of the next layer are
multiplied by them (cross-layer equalization, arXiv 1906.04721, section 4.1). An activation has one
grid for all channels, which then suits each of them better. The paper derives the factors from
ranges of weights; here they follow from the scales of the grids.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from gdfq.functional.grid import Layout, along_channels
from gdfq.graph import operators, queries
from gdfq.graph.batch_norms import fold_batch_norms
from gdfq.graph.capture import Captured
from gdfq.graph.tensors import flat_module, tensors_of
from gdfq.quantizers.lsq import best_range, scales_of_channels
from gdfq.student.placement import activation_bits, layer_input_bits
from gdfq.student.scheme import Scheme

_MAX_FACTOR = 8.0
"""Channels that are almost always 0 would get arbitrary factors without this limit."""


@torch.no_grad()
def channel_scales(teacher: Captured, scheme: Scheme, *inputs: Tensor) -> dict[str, Tensor]:
    """Return the divisors of channels [C] of activations, by the names of their nodes.

    For each channel c of each activation that the scheme quantizes, Δ_c is the scale of the best
    grid for this channel, and Δ that of the best grid for all channels, with the bits that enter
    layers where it is rounded again for them. The channel's divisor is (Δ_c / Δ)^σ. The weights of
    the next layer, which are multiplied by it, share grids too, so σ is the activation's share of
    the noise of rounding (`activation_noise_share`). Activations that must agree, such as the terms
    of a sum, share the mean of their logarithms, and the layers that read any of them. Channels
    have no divisor if any operator reads them other than convolutions, linear layers, ReLUs, sums,
    poolings and padding with zeros.

    Args:
        teacher: The trained network.
        scheme: What is quantized, and to how many bits.
        *inputs: [N, *shape] for each input of the network.
    """
    teacher = fold_batch_norms(teacher)
    ties = _ties(teacher.network.graph)
    bits_of = activation_bits(teacher, scheme) | layer_input_bits(teacher, scheme)
    recorder = _ChannelRatios(teacher.network, bits_of, _reader_bits(teacher, scheme, ties), ties)
    recorder.run(*inputs)
    return {node.name: recorder.scale(top) for node, top in ties.items() if top in recorder.found}


def activation_noise_share(bits: int, weight_bits: Sequence[int | None]) -> float:
    """Return which share of the noise of rounding is that of an activation.

        σ = 1 / (1 + mean over layers of 4^(a − w))

    The noise power of a grid of k bits is proportional to 4^−k. At equal bits σ is ½; 8-bit
    activations leave 4-bit weights as they are.

    Args:
        bits: Bits of the activation, a.
        weight_bits: Bits of the weight of each layer that reads it, w; None for float, which adds
            no noise.
    """
    noise = sum(4.0 ** (bits - w) for w in weight_bits if w is not None)
    return 1 / (1 + noise / max(1, len(weight_bits)))


@torch.no_grad()
def rescaled(teacher: Captured, scales: Mapping[str, Tensor]) -> Captured:
    """Return an equal teacher, batch norms folded, channels divided by their `channel_scales`."""
    teacher = fold_batch_norms(teacher)
    graph = teacher.network.graph
    tensors = tensors_of(teacher.network)

    def put(node: fx.Node, value: Tensor) -> None:
        trains = isinstance(tensors[str(node.target)], nn.Parameter)
        new = nn.Parameter(value, requires_grad=False) if trains else value
        tensors[str(node.target)] = new

    for layer in filter(queries.has_weight, graph.nodes):
        x, weight_node, bias_node = layer.args[:3]
        layout, groups = queries.weight_layout(layer)
        if x.name in scales:
            weight = tensors[weight_node.target]
            put(weight_node, weight * _along_inputs(scales[x.name], weight, layout))
        if layer.name in scales:
            weight, scale = tensors[weight_node.target], scales[layer.name]
            put(weight_node, weight / along_channels(scale, weight, layout, groups))
            put(bias_node, tensors[bias_node.target] / scale)
    return replace(teacher, network=flat_module(graph, tensors))


class _ChannelRatios(fx.Interpreter):
    """Runs a network and records σ log(Δ_c / Δ) of the channels of its activations."""

    def __init__(
        self,
        network: fx.GraphModule,
        bits_of: Mapping[fx.Node, int],
        reader_bits: Mapping[fx.Node, Sequence[int | None]],
        ties: Mapping[fx.Node, fx.Node],
    ) -> None:
        super().__init__(network)
        self.bits_of, self.reader_bits, self.ties = bits_of, reader_bits, ties
        self.found: dict[fx.Node, list[Tensor]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.bits_of and n in self.ties:
            bits = self.bits_of[n]
            apart = (scales_of_channels(value, bits) / best_range(value, bits)[0]).log()
            silent = value.transpose(0, 1).flatten(1).abs().amax(1) == 0
            apart.masked_fill_(silent, 0.0)
            top = self.ties[n]
            share = activation_noise_share(bits, self.reader_bits.get(top, ()))
            self.found.setdefault(top, []).append(share * apart)
        return value

    def scale(self, top: fx.Node) -> Tensor:
        """Return the divisor of each channel, [C]."""
        apart = torch.stack(self.found[top]).mean(0)
        return apart.clamp(-math.log(_MAX_FACTOR), math.log(_MAX_FACTOR)).exp()


def _reader_bits(
    teacher: Captured, scheme: Scheme, ties: Mapping[fx.Node, fx.Node]
) -> dict[fx.Node, list[int | None]]:
    """Return the bits of the weights of the layers that read activations with the same divisors.

    Args:
        teacher: The network, batch norms folded.
        scheme: Bits of its layers.
        ties: For each activation that may be scaled, the activation whose divisors it has.

    Returns:
        Bits, None for float, by the activations that others have the divisors of.
    """
    layers = list(filter(queries.has_weight, teacher.network.graph.nodes))
    weight_bits = scheme.weight_bits(layers)
    found: dict[fx.Node, list[int | None]] = {}
    for layer in layers:
        if (source := queries.input_of(layer)) in ties:
            found.setdefault(ties[source], []).append(weight_bits.get(layer))
    return found


def _ties(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Return, for each activation that may be scaled, the activation whose divisors it has."""
    above: dict[fx.Node, fx.Node] = {}

    def top(node: fx.Node) -> fx.Node:
        while above[node] is not node:
            node = above[node]
        return node

    constants = [node for node in graph.nodes if node.op == "get_attr"]
    uses = Counter(str(node.target) for node in constants for _ in node.users)
    barred: list[fx.Node] = []
    for node in graph.nodes:
        inputs = list(filter(queries.is_activation, node.all_input_nodes))
        if queries.is_activation(node):
            above[node] = node
        if queries.has_weight(node) and _is_plain(node, uses):
            continue
        if _passes(node, inputs):
            for x in inputs:
                above[top(x)] = node
        elif operators.name_of(node) != operators.BATCH_SIZE:
            barred += [*inputs, node] if node in above else inputs
    fixed = {top(node) for node in barred}
    return {node: top(node) for node in above if top(node) not in fixed}


def _is_plain(layer: fx.Node, uses: Counter[str]) -> bool:
    """Return whether channels are dimension 1, and only this layer uses its weight and bias."""
    constants: Any = layer.args[1:3]
    return queries.has_channels_second(layer) and all(
        node.op == "get_attr" and uses[str(node.target)] == 1 for node in constants
    )


def _passes(node: fx.Node, inputs: list[fx.Node]) -> bool:
    """Return whether a positive factor on an input channel is one on the output channel."""
    name = operators.name_of(node)
    if not inputs or not queries.is_activation(node):
        return False
    shape, shapes = node.meta["val"].shape, [x.meta["val"].shape for x in inputs]
    if name in operators.SUMS:
        return len(inputs) == 2 and all(s == shape for s in shapes)
    if name in operators.MEANS:
        dims: Any = node.args[1]
        return bool(dims) and {0, 1}.isdisjoint(d % len(shapes[0]) for d in dims)
    if name in operators.PADS:
        of_channels = len(node.args[1]) > 2 * (len(shape) - 2)  # type: ignore[arg-type]
        return queries.keeps_grid(node) and not of_channels
    if name in operators.RESHAPES:
        return bool(shape[:2] == shapes[0][:2])
    if name in operators.WINDOW_POOLING:  # with fewer dimensions it also pools over channels
        return len(shape) == operators.WINDOW_POOLING[name] + 2
    return name in operators.SCALE_EQUIVARIANT


def _along_inputs(values: Tensor, weight: Tensor, layout: Layout) -> Tensor:
    """Return values of the input channels [I], shaped to broadcast against `weight`."""
    ones = [1] * (weight.ndim - 2)
    if layout is Layout.TRANSPOSED:
        return values.view(-1, 1, *ones)
    groups = len(values) // weight.shape[1]  # of [O, I/g, *k]
    each = values.view(groups, -1).repeat_interleave(weight.shape[0] // groups, 0)
    return each.view(weight.shape[0], weight.shape[1], *ones)
