"""Batch norms folded into the layers before them, exactly, while the network is still float.

A batch norm with fixed statistics is y = s x + t for each channel, so behind a convolution or
linear layer it only scales the weight's output channels and shifts the bias. A student that is
not to train the batch norms is smaller and faster without them, and so is its teacher.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from gdfq.functional.grid import along_channels
from gdfq.graph import operators
from gdfq.graph.capture import Captured, flat_module, tensors_of
from gdfq.graph.statistics import batch_norm_of


@torch.no_grad()
def fold_batch_norms(teacher: Captured) -> Captured:
    """The same function with each batch norm that alone follows a layer made part of it.

    Batch norms elsewhere (before a convolution, behind a shared output) stay as they are. Every
    layer has a bias afterwards, if of zeros.
    """
    graph = fx.Graph()
    tensors = tensors_of(teacher.network)
    new: dict[fx.Node, fx.Node] = {}
    batch_norms = set(teacher.batch_norms)
    for node in teacher.network.graph.nodes:
        if node in batch_norms and _folds_into(node.args[0]):
            new[node] = new[node.args[0]]
            scale, shift = batch_norm_of(teacher, node).scale_and_shift()
            _rescale_(new[node], scale, shift, tensors)
        else:
            new[node] = graph.node_copy(node, new.__getitem__)
            if operators.has_weight(node) and _bias(node) is None:
                _add_bias_(new[node], tensors)
    graph.eliminate_dead_code(lambda node: node.op in {"placeholder", "output"})
    return replace(teacher, network=flat_module(graph, tensors))


def _folds_into(layer: fx.Node) -> bool:
    """Whether a node is a layer with constant weight and bias and a single user."""
    bias = _bias(layer)
    return (
        operators.has_weight(layer)
        and operators.has_channels_second(layer)
        and len(layer.users) == 1
        and (bias is None or (isinstance(bias, fx.Node) and bias.op == "get_attr"))
    )


def _bias(layer: fx.Node) -> Any:
    return layer.args[2] if len(layer.args) > 2 else None


def _rescale_(layer: fx.Node, scale: Tensor, shift: Tensor, tensors: dict[str, Tensor]) -> None:
    """Multiply a layer's output channels by `scale` [O] and add `shift` [O], as new tensors."""
    x, weight_node, *rest = layer.args
    bias_node, *options = rest or [None]
    assert isinstance(weight_node, fx.Node)
    weight = tensors[str(weight_node.target)]
    factor = along_channels(scale, weight, *operators.weight_layout(layer))
    bias = shift if bias_node is None else shift + scale * tensors[str(bias_node.target)]  # type: ignore[union-attr]
    base = str(weight_node.target).removesuffix(".weight")
    with layer.graph.inserting_before(layer):
        constants = [
            layer.graph.get_attr(_keep(tensors, f"{base}.{part}", value))
            for part, value in (("folded_weight", weight * factor), ("folded_bias", bias))
        ]
    layer.args = (x, *constants, *options)


def _add_bias_(layer: fx.Node, tensors: dict[str, Tensor]) -> None:
    x, weight_node, *rest = layer.args
    assert isinstance(weight_node, fx.Node)
    weight = tensors[str(weight_node.target)]
    channels = layer.meta["val"].shape[operators.channel_dim(layer)]
    name = _keep(tensors, f"{weight_node.target}_bias", weight.new_zeros(channels))
    with layer.graph.inserting_before(layer):
        layer.args = (x, weight_node, layer.graph.get_attr(name), *rest[1:])


def _keep(tensors: dict[str, Tensor], name: str, value: Tensor) -> str:
    """Add a parameter under a name of its own: a shared layer folds with several batch norms."""
    while name in tensors:
        name += "_"
    tensors[name] = nn.Parameter(value, requires_grad=False)
    return name
