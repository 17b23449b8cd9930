"""Operators of a quantized network that a runtime computes in float, and the reasons."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from gdfq.graph import operators, queries
from gdfq.student.attention import feeds_softmax_only, stays_float
from gdfq.student.placement import shapes_outputs
from gdfq.student.scheme import Scheme


@dataclass(frozen=True)
class FloatOperators:
    """Operators of one kind that a runtime computes in float, all for the same reason."""

    operator: str
    count: int
    why: str


def find_float_operators(
    nodes: list[fx.Node],
    weight_bits: Mapping[fx.Node, int],
    activation_bits: Mapping[fx.Node, int],
    scheme: Scheme,
) -> tuple[FloatOperators, ...]:
    """The operators that a runtime computes in float, in graph order.

    Args:
        nodes: The nodes of the folded teacher's graph.
        weight_bits: Bits of the quantized weights by layer.
        activation_bits: Bits of the quantized activations.
        scheme: The scheme that gave these bits.
    """
    output_nodes = shapes_outputs(nodes)
    reasons: Counter[tuple[str, str]] = Counter()
    for node in nodes:
        reason = _reason(node, weight_bits, activation_bits, scheme, node in output_nodes)
        if reason is not None:
            reasons[operators.short_name(node), reason] += 1
    return tuple(FloatOperators(name, count, reason) for (name, reason), count in reasons.items())


def _reason(
    node: fx.Node,
    weight_bits: Mapping[fx.Node, int],
    activation_bits: Mapping[fx.Node, int],
    scheme: Scheme,
    only_shapes_outputs: bool,
) -> str | None:
    """The reason for which a runtime computes a node in float; None if it does not."""
    name = operators.name_of(node)
    if name in operators.RECURRENT:  # it has several outputs
        return "no integer form"
    is_fused = (
        queries.keeps_grid(node)
        or queries.is_clamp(node)
        or name == operators.BATCH_NORM
        or feeds_softmax_only(node)
        or queries.is_new(node)
    )
    if not (operators.short_name(node) and queries.is_activation(node)) or is_fused:
        return None
    if name not in operators.INTEGER_CONSUMERS:
        return "no integer form"
    if node in scheme.float_nodes(node.graph) and node not in weight_bits:
        return "depends on the time step alone"
    if queries.has_weight(node) and node not in weight_bits:
        return "float by --layer-bits, or by default"
    if scheme.placement == "tokens":
        return None if node in weight_bits else "no linear layer"
    if stays_float(node):
        return "its grid would be too coarse, or no integer kernel exists"
    sources = filter(queries.is_activation, node.all_input_nodes)
    if all(queries.grid_source(source) in activation_bits for source in sources):
        return None
    if only_shapes_outputs:
        return "only shapes the outputs"
    if scheme.placement == "relu":
        return "its input is not the output of a ReLU; placement relu quantizes only those"
    return "its input is float"
