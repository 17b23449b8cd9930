"""Batch norms: their values, and how they are folded into the layers before them.

A batch norm with fixed statistics is y = s x + t for each channel, so after a convolution or
linear layer it only scales the output channels of the weight and shifts the bias. A student that
does not train the batch norms is smaller and faster without them, and so is its teacher.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from gdfq.functional.grid import along_channels
from gdfq.graph import operators, queries
from gdfq.graph.capture import Captured
from gdfq.graph.rewrite import Copy, rewrite
from gdfq.graph.tensors import flat_module, tensors_of


@dataclass(frozen=True)
class BatchNorm:
    """A batch norm with fixed statistics; each tensor of shape [channels]."""

    weight: Tensor
    bias: Tensor
    mean: Tensor
    variance: Tensor
    eps: float
    affine: bool
    """Whether weight and bias are the network's own; otherwise they are 1 and 0."""

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """Return s and t of y = s x + t, each [channels]."""
        scale = self.weight * (self.variance + self.eps).rsqrt()
        return scale, self.bias - self.mean * scale


def batch_norm_of(teacher: Captured, node: fx.Node) -> BatchNorm:
    """Return the values of a batch-norm node (absent affine parameters are 1 and 0)."""
    tensors: dict[Any, Any] = {None: None, **tensors_of(teacher.network)}
    _, weight, bias, mean, variance, _training, _momentum, eps, _cudnn = node.args
    assert isinstance(eps, float)
    weight, bias, mean, variance = (
        tensors[getattr(argument, "target", None)] for argument in (weight, bias, mean, variance)
    )
    return BatchNorm(
        torch.ones_like(mean) if weight is None else weight,
        torch.zeros_like(mean) if bias is None else bias,
        mean,
        variance,
        eps,
        weight is not None,
    )


def batch_norm_name(node: fx.Node) -> str:
    """Return the name of the module that holds a batch norm, such as `layer1.0.bn1`."""
    mean = node.args[3]
    assert isinstance(mean, fx.Node)
    return str(mean.target).rpartition(".")[0] or str(mean.target)


def is_batch_norm(node: fx.Node) -> bool:
    """Return whether the node is a batch norm of a captured graph."""
    return operators.name_of(node) == operators.BATCH_NORM


def batch_norm_after(
    node: fx.Node, is_norm: Callable[[fx.Node], bool] = is_batch_norm
) -> fx.Node | None:
    """Return the batch norm that folds into a layer, or None.

    It is the only user of the layer and normalises the channels of the layer's output.

    Args:
        node: A layer, whose weight and bias must be constants for the folding itself.
        is_norm: Decides whether a node is a batch norm. The default suits captured graphs.
    """
    if len(node.users) != 1 or not queries.has_channels_second(node):
        return None
    (user,) = node.users
    return user if is_norm(user) else None


@torch.no_grad()
def fold_batch_norms(teacher: Captured) -> Captured:
    """Return an equal teacher whose batch norms are part of the layers before them.

    Batch norms elsewhere (before a convolution, after a shared output) stay as they are. Each
    layer then has a bias, which may be zeros.
    """
    tensors = tensors_of(teacher.network)

    def change(copy: Copy, node: fx.Node) -> fx.Node | None:
        if is_batch_norm(node):
            layer = queries.input_of(node)
            if batch_norm_after(layer) is not node or not _is_constant(layer):
                return None
            scale, shift = batch_norm_of(teacher, node).scale_and_shift()
            _rescale_(copy[layer], scale, shift, tensors)
            return copy[layer]
        if queries.has_weight(node) and queries.bias_of(node) is None:
            layer = copy.of(node)
            _add_bias_(layer, tensors)
            return layer
        return None

    graph = rewrite(teacher.network.graph, change)
    graph.eliminate_dead_code(lambda node: node.op in {"placeholder", "output"})
    return replace(teacher, network=flat_module(graph, tensors))


def _is_constant(layer: fx.Node) -> bool:
    """Return whether a node is a layer with constant weight and bias."""
    if not queries.has_weight(layer):
        return False
    bias = queries.bias_of(layer)
    return bias is None or bias.op == "get_attr"


def _rescale_(layer: fx.Node, scale: Tensor, shift: Tensor, tensors: dict[str, Tensor]) -> None:
    """Multiply a layer's output channels by `scale` [O] and add `shift` [O], as new tensors."""
    weight_name, bias_node = queries.weight_name(layer), queries.bias_of(layer)
    weight = tensors[weight_name]
    factor = along_channels(scale, weight, *queries.weight_layout(layer))
    bias = shift if bias_node is None else shift + scale * tensors[str(bias_node.target)]
    base = weight_name.removesuffix(".weight")
    with layer.graph.inserting_before(layer):
        constants = [
            layer.graph.get_attr(_added(tensors, f"{base}.{part}", value))
            for part, value in (("folded_weight", weight * factor), ("folded_bias", bias))
        ]
    layer.args = (queries.input_of(layer), *constants, *queries.options_of(layer))


def _add_bias_(layer: fx.Node, tensors: dict[str, Tensor]) -> None:
    """Give a layer a bias of zeros."""
    name = queries.weight_name(layer)
    channels = layer.meta["val"].shape[queries.channel_dim(layer)]
    bias = _added(tensors, f"{name}_bias", tensors[name].new_zeros(channels))
    x, weight, options = queries.input_of(layer), queries.weight_of(layer), layer.args[3:]
    with layer.graph.inserting_before(layer):
        layer.args = (x, weight, layer.graph.get_attr(bias), *options)


def _added(tensors: dict[str, Tensor], name: str, value: Tensor) -> str:
    """Add a parameter under a name of its own: a shared layer folds with several batch norms."""
    while name in tensors:
        name += "_"
    tensors[name] = nn.Parameter(value, requires_grad=False)
    return name
