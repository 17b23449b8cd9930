"""Questions about nodes: what a layer is, what a tensor depends on, which grid it lies on.

They apply to the graphs of the teacher, the student and the integer network. `meta["val"]` of a
node is the tensor that capture recorded there, with a batch of a few entries.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from gdfq.functional import grid
from gdfq.graph import operators
from gdfq.graph.operators import name_of
from gdfq.graph.tensors import tensors_of


def inputs(graph: fx.Graph) -> list[fx.Node]:
    """Return the placeholders of a graph, in the order of the network's inputs."""
    return list(graph.find_nodes(op="placeholder"))


def outputs(graph: fx.Graph) -> list[fx.Node]:
    """Return the nodes whose values a graph returns, in order, with repetitions."""
    (output,) = graph.find_nodes(op="output")
    returned: Any = output.args[0]
    return list(returned) if isinstance(returned, tuple | list) else [returned]


# ----------------------------------------------------------------------------- layers


def is_layer(node: fx.Node) -> bool:
    """Return whether the node is a convolution or linear layer, its weight constant or computed."""
    return name_of(node) in operators.WEIGHTED


def has_weight(node: fx.Node) -> bool:
    """Return whether the node is a convolution or linear layer with a weight of its own."""
    return is_layer(node) and weight_of(node).op == "get_attr"


def is_fixed(layer: fx.Node) -> bool:
    """Return whether neither weight nor bias of a layer is computed."""
    bias = bias_of(layer)
    return has_weight(layer) and (bias is None or bias.op == "get_attr")


def layers_of(network: fx.GraphModule) -> list[fx.Node]:
    """Return all convolutions and linear layers of a teacher or student, in order."""
    return [node for node in network.graph.nodes if is_layer(node)]


def weighted_layers(network: fx.GraphModule) -> list[fx.Node]:
    """Return the layers with a weight of their own, in order."""
    return list(filter(has_weight, network.graph.nodes))


def weights_of(network: fx.GraphModule) -> dict[fx.Node, Tensor]:
    """Return the weight of each layer of a teacher.

    Raises:
        LookupError: A weight is computed from an input.
    """
    tensors = tensors_of(network)
    return {node: tensors[weight_name(node)] for node in layers_of(network)}


def input_of(layer: fx.Node) -> fx.Node:
    """Return the input of a layer or batch norm."""
    x = layer.args[0]
    assert isinstance(x, fx.Node)
    return x


def weight_of(layer: fx.Node) -> fx.Node:
    """Return the node of a layer's weight."""
    weight = layer.args[1]
    assert isinstance(weight, fx.Node)
    return weight


def weight_name(layer: fx.Node) -> str:
    """Return the name of the tensor that is a layer's weight."""
    return str(weight_of(layer).target)


def bias_of(layer: fx.Node) -> fx.Node | None:
    """Return the node of a layer's bias, or None."""
    bias = layer.args[2] if len(layer.args) > 2 else None
    assert bias is None or isinstance(bias, fx.Node)
    return bias


def options_of(layer: fx.Node) -> tuple[Any, ...]:
    """Return the arguments of a layer after input, weight and bias, such as stride and padding."""
    return layer.args[3:]


def layer_name(node: fx.Node) -> str:
    """Return the name of the module that holds a layer's weight, such as `layer1.0.conv1`.

    For a module with several weights, such as attention, the weight is part of it: `in_proj`.
    """
    path, _, leaf = weight_name(node).rpartition(".")
    path, parametrized, _ = f"{path}.".partition(".parametrizations.weight.")
    # Weight norm and pruning keep what they compute the weight from.
    which = re.sub(r"_?weight(_orig|_v|_g|_bar)?_*$", "", re.sub(r"^(folded_)+", "", leaf))
    return ".".join(filter(None, (path.rstrip("."), "" if parametrized else which))) or leaf


def has_channels_second(node: fx.Node) -> bool:
    """Return whether a layer's output channels are dimension 1, as a batch norm expects.

    The channels of a linear layer are the last dimension, which is another one if the input has
    three or more dimensions.
    """
    return name_of(node) not in operators.LINEARS or node.meta["val"].ndim == 2


def channel_dim(layer: fx.Node) -> int:
    """Return the dimension of a layer's output that holds its channels."""
    return -1 if name_of(layer) in operators.LINEARS else 1


def weight_layout(node: fx.Node) -> tuple[grid.Layout, int]:
    """Return the layout of a layer's weight, and the number of its groups."""
    if name_of(node) in operators.TRANSPOSED_CONVOLUTIONS:
        groups = node.args[6] if len(node.args) > 6 else node.kwargs.get("groups", 1)
        assert isinstance(groups, int)
        return grid.Layout.TRANSPOSED, groups
    return grid.Layout.ROWS, 1


def group_count(layer: fx.Node) -> int:
    """Return the number of groups of a layer."""
    if name_of(layer) in operators.LINEARS:
        return 1
    groups = layer.args[6] if len(layer.args) > 6 else layer.kwargs.get("groups", 1)
    assert isinstance(groups, int)
    return groups


def is_depthwise(layer: fx.Node) -> bool:
    """Return whether each output channel of a layer is computed from one of several inputs."""
    if name_of(layer) not in operators.CONVOLUTIONS:
        return False
    channels = int(input_of(layer).meta["val"].shape[1])
    return channels > 1 and group_count(layer) == channels


# ------------------------------------------------------------------------ activations


def is_activation(node: fx.Node) -> bool:
    """Return whether the node is a floating-point tensor that depends on an input."""
    value = node.meta.get("val")
    return node.op != "get_attr" and isinstance(value, torch.Tensor) and value.is_floating_point()


def depends_on_inputs(node: fx.Node) -> bool:
    """Return whether the node is a tensor of any kind that depends on an input."""
    return node.op not in {"get_attr", "output"} and isinstance(node.meta.get("val"), torch.Tensor)


def computed_from_scalars(graph: fx.Graph) -> set[fx.Node]:
    """Return the tensors that depend on inputs of one number per entry alone, such as a time step.

    They are small, and the same for all positions of an image.
    """
    found: set[fx.Node] = set()
    for node in filter(depends_on_inputs, graph.nodes):
        if node.op == "placeholder":
            is_scalar = node.meta["val"].ndim == 1
        else:
            sources = [
                source
                for source in node.all_input_nodes
                if depends_on_inputs(source) and not is_new(source)
            ]
            is_scalar = bool(sources) and found.issuperset(sources)
        if is_scalar:
            found.add(node)
    return found


def computed_from(start: fx.Node) -> set[fx.Node]:
    """Return a node and all tensors that depend on it."""
    found = {start}
    for node in filter(depends_on_inputs, start.graph.nodes):
        if not is_new(node) and not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def is_batch_size(node: fx.Node) -> bool:
    """Return whether the node is the length of the batch."""
    return name_of(node) == operators.BATCH_SIZE and bool(node.args[1] == 0)


def is_new(node: fx.Node) -> bool:
    """Return whether the node is a tensor of one number, which takes its device from another."""
    return name_of(node) in operators.NEW


def normalises_batch(node: fx.Node) -> bool:
    """Return whether the node normalises over the images of a batch, as one group.

    So capture writes a batch norm without running statistics.
    """
    is_group_norm = name_of(node) == operators.GROUP_NORM
    return is_group_norm and input_of(node).meta["val"].shape[0] == 1


def is_root(node: fx.Node) -> bool:
    """Return whether the node is x^p with 0 < p < 1, such as a square root."""
    if name_of(node) != operators.POWER:
        return name_of(node) == operators.SQUARE_ROOT
    exponent = node.args[1]
    return isinstance(exponent, int | float) and 0 < exponent < 1


def divides_by_activation(node: fx.Node) -> bool:
    """Return whether the node is x / y with y that depends on an input; a grid may round y to 0."""
    if name_of(node) != operators.DIVIDE:
        return False
    divisor = node.args[1]
    return isinstance(divisor, fx.Node) and is_activation(divisor)


def pools_powers(node: fx.Node) -> bool:
    """Return whether the node is a mean or sum of powers, as generalized mean pooling has it.

    Their range is too wide for a grid, and the root that follows has no derivative at 0.
    """
    is_pooling = name_of(node) in operators.POOLING
    return is_pooling and name_of(grid_source(input_of(node))) in operators.POWERS


def mean_of(node: fx.Node) -> tuple[list[int], bool] | None:
    """Return the dimensions of a mean and whether they stay, or None if the node is none.

    Adaptive pooling to one value is the mean over the last dimensions.
    """
    name = name_of(node)
    if name == operators.MEAN and not node.kwargs and 2 <= len(node.args) <= 3:
        dims: Any = node.args[1]
        return (list(dims), len(node.args) == 3 and bool(node.args[2])) if dims else None
    for count, adaptive in operators.ADAPTIVE_AVERAGE_POOLING.items():
        if name == adaptive:
            size: Any = node.args[1]
            return (list(range(-count, 0)), True) if set(size) == {1} else None
    return None


@dataclass(frozen=True)
class AveragePooling:
    """Options of average pooling, as PyTorch names them; an empty stride is the kernel."""

    kernel_size: Any
    stride: Any = ()
    padding: Any = 0
    ceil_mode: bool = False
    count_include_pad: bool = True
    divisor_override: int | None = None


def average_pooling_of(node: fx.Node) -> AveragePooling | None:
    """Return the options of an average over windows, or None if the node is none."""
    if name_of(node) not in operators.AVERAGE_POOLING.values():
        return None
    options: Any = node.args[1:]
    named: Any = node.kwargs
    return AveragePooling(*options, **named)


def pads_circularly(node: fx.Node) -> bool:
    """Return whether the node pads a tensor with its other end."""
    return name_of(node) in operators.PADS and "circular" in (*node.args, *node.kwargs.values())


def has_constant_gradient(node: fx.Node) -> bool:
    """Return whether the gradient of an operator depends on no tensor, as that of a sum."""
    name = name_of(node)
    if name in operators.PADS:
        return not {"circular", "reflect", "replicate"} & {*node.args, *node.kwargs.values()}
    return name in operators.OF_CONSTANT_GRADIENT


def elements_per_image(node: fx.Node) -> int:
    """Return the elements of a node's tensor for one entry of the batch."""
    first = inputs(node.graph)[0]
    count = math.prod(map(int, node.meta["val"].shape))
    return count // int(first.meta["val"].shape[0])


def is_rectifier(node: fx.Node) -> bool:
    """Return whether the node is a ReLU or a bounded ReLU (ReLU6, hardtanh or clamp from 0)."""
    name = name_of(node)
    if name in operators.RECTIFIERS:
        return True
    if name in operators.CLAMPS:
        return clamp_ends(node)[0] == 0
    return False


def is_clamp(node: fx.Node) -> bool:
    """Return whether the node is a ReLU, a bounded ReLU or another clamp to numbers."""
    return name_of(node) in operators.RECTIFIERS | operators.CLAMPS


def clamp_ends(node: fx.Node) -> tuple[float, float]:
    """Return the lowest and the highest value that a clamp gives; infinite where it has none."""
    name = name_of(node)
    given: dict[str, Any] = {}
    if name in operators.RECTIFIERS:
        given = {"min": 0.0, "max": 6.0} if name == operators.RELU6 else {"min": 0.0}
    elif name in operators.CLAMPS:
        if name == operators.HARDTANH:
            given = {"min": -1.0, "max": 1.0}
        names = ("max",) if name == operators.CLAMP_MAX else ("min", "max")
        given |= dict(zip(names, node.args[1:], strict=False))
        given |= {key.removesuffix("_val"): value for key, value in node.kwargs.items()}
    low, high = given.get("min"), given.get("max")
    return -math.inf if low is None else float(low), math.inf if high is None else float(high)


def value_limits(node: fx.Node) -> tuple[float, float]:
    """Return the ends between which a grid must lie: those of a clamp, and of clamps before it.

    An end that excludes 0 counts as none, because every grid contains 0.
    """
    limits = -math.inf, math.inf
    while is_clamp(node):
        low, high = clamp_ends(node)
        limits = (
            max(limits[0], -math.inf if low > 0 else low),
            min(limits[1], math.inf if high < 0 else high),
        )
        node = input_of(node)
    return limits


def clamps_around_zero(node: fx.Node) -> bool:
    """Return whether a node is a clamp whose ends contain 0, so that a grid can clip as it does."""
    if not is_clamp(node):
        return False
    low, high = clamp_ends(node)
    return low <= 0 <= high


def keeps_grid(node: fx.Node) -> bool:
    """Return whether the node only moves values: its output lies on the grid of its first input."""
    name = name_of(node)
    if name == operators.GETITEM:  # one of several outputs
        return keeps_grid(node.all_input_nodes[0])
    if name in operators.PADS:
        # A pad value other than 0 need not lie on the grid.
        values = [a for a in (*node.args[2:], *node.kwargs.values()) if isinstance(a, int | float)]
        return all(value == 0 for value in values)
    return name in operators.GRID_PRESERVING


def has_several_outputs(node: fx.Node) -> bool:
    """Return whether the node only moves values, to several tensors, or is one of these."""
    return name_of(node) in operators.SEVERAL_OUTPUTS | {operators.GETITEM}


def grid_source(node: fx.Node) -> fx.Node:
    """Return the node whose values the given node only moves; never a constant."""
    while keeps_grid(node):
        (source, *_) = node.all_input_nodes
        if source.op == "get_attr":
            break
        node = source
    return node
