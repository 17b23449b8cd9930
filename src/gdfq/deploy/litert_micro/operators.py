"""Which operators of a network a file for TFLite Micro has, judged before anything is quantized."""

from collections.abc import Set as AbstractSet

from torch import Tensor, fx

from gdfq.deploy.litert.moves import MOVES
from gdfq.deploy.litert_micro.arithmetic import windows_of_average
from gdfq.deploy.refusal import refused
from gdfq.graph import operators, queries
from gdfq.graph.batch_norms import batch_norm_after
from gdfq.graph.operators import name_of, short_name

_MAX_DIMS = 5
"""Most dimensions of a tensor that TFLite Micro transposes."""
_LARGER_MOVES = frozenset({"pixel_shuffle", "pixel_unshuffle"})
"""Moves of maps that transpose six dimensions."""
_ENDS = operators.SOFTMAX | operators.LOG_SOFTMAX | operators.SIGMOIDS
"""Last functions, which a file leaves to the application."""
_ARITHMETIC = operators.SUMS | operators.ELEMENTWISE_PRODUCTS


def unsupported(graph: fx.Graph) -> list[str]:
    """Return the operators of a graph that would be computed in floats, each with its layer.

    Args:
        graph: The graph of a teacher or of an integer network.
    """
    ends = {node for node in queries.outputs(graph) if name_of(node) in _ENDS}
    return refused(graph, lambda node, constants: node in ends or _is_supported(node, constants))


def _is_supported(node: fx.Node, constants: AbstractSet[fx.Node]) -> bool:
    name = name_of(node)
    if name in operators.QUANTIZATION | {operators.BATCH_SIZE, operators.GETITEM}:
        return True
    if queries.is_layer(node):
        return queries.weight_of(node) in constants and not _has_grouped_scales(node)
    if name == operators.BATCH_NORM:
        layer = queries.input_of(node)
        return queries.is_layer(layer) and batch_norm_after(layer) is node
    if queries.is_clamp(node):
        return queries.is_rectifier(node)
    if name in _ARITHMETIC:
        terms = [argument for argument in node.args if isinstance(argument, fx.Node)]
        return len(terms) == len(node.args) == 2 and not node.kwargs and not constants & {*terms}
    if name in operators.JOINS | operators.IDENTITIES:
        return True
    if short_name(node) in MOVES and queries.keeps_grid(node):
        value = node.meta.get("val")
        few = not isinstance(value, Tensor) or value.ndim <= _MAX_DIMS
        return few and short_name(node) not in _LARGER_MOVES
    return _is_average(node)


def _has_grouped_scales(node: fx.Node) -> bool:
    """Return whether the scales of a weight are not those of its output channels."""
    transposed = name_of(node) in operators.TRANSPOSED_CONVOLUTIONS
    return transposed and queries.group_count(node) > 1


def _is_average(node: fx.Node) -> bool:
    if name_of(node) not in operators.POOLING:
        return False
    value = queries.input_of(node).meta.get("val")
    if not isinstance(value, Tensor):  # the graph of an integer network; its writer knows shapes
        return True
    return windows_of_average(node, tuple(map(int, value.shape))) is not None
