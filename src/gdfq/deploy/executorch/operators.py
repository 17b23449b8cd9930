"""Which operators of a network a `.pte` file has, judged before anything is quantized.

They are those whose files were equal in ExecuTorch; `make check` repeats that for the usual ones.
"""

from collections.abc import Set as AbstractSet

from torch import fx

from gdfq.deploy.refusal import refused
from gdfq.graph import operators, queries
from gdfq.graph.operators import name_of, short_name

_SUPPORTED = frozenset(
    {
        *("adaptive_avg_pool2d", "add", "amax", "avg_pool1d", "avg_pool2d", "batch_norm", "cat"),
        *("channel_shuffle", "clone", "div", "elu", "expand", "flip", "gelu", "group_norm"),
        *("hardsigmoid", "hardswish", "instance_norm", "layer_norm", "leaky_relu", "matmul"),
        *("max_pool1d", "max_pool2d", "maximum", "mean", "mul", "pad", "permute"),
        *("pixel_shuffle", "prelu", "reshape", "roll", "select", "sigmoid", "silu", "slice"),
        *("softmax", "sqrt", "stack", "sub", "tanh", "transpose", "unsqueeze"),
        *("upsample_bilinear2d", "upsample_nearest2d"),
    }
)
"""Short names of operators beside layers, clamps and what divides tensors."""


def unsupported(graph: fx.Graph) -> list[str]:
    """Return the operators of a graph that a file has no form for, each with its layer or node.

    Args:
        graph: The graph of a teacher or of an integer network.
    """
    return refused(graph, _is_supported)


def _is_supported(node: fx.Node, constants: AbstractSet[fx.Node]) -> bool:
    name = name_of(node)
    if queries.is_layer(node):
        return queries.weight_of(node) in constants and name not in operators.OF_VOLUMES
    if queries.is_clamp(node) or name in operators.QUANTIZATION | operators.DIVISIONS:
        return True
    if queries.pads_circularly(node):  # written as copies into a tensor, which no kernel runs
        return False
    if name in {operators.BATCH_SIZE, operators.GETITEM}:  # what it is one of is judged itself
        return True
    return short_name(node) in _SUPPORTED
