"""Paddings that convolutions can do themselves."""

from typing import Any

from torch import fx

from gdfq.functional.windows import per_axis
from gdfq.graph import operators


def merge_paddings_(graph: fx.Graph) -> None:
    """Let convolutions pad with zeros themselves, where a node before them does.

    A convolution pads both ends of an axis alike, so a padding that differs between them stays. The
    node writes its whole input anew, in every pass forward and backward.
    """
    for node in list(graph.nodes):
        if operators.name_of(node) not in operators.PADDED_CONVOLUTIONS:
            continue
        x = node.args[0]
        assert isinstance(x, fx.Node)
        spatial = x.meta["val"].ndim - 2
        widths = _symmetric_widths(x, spatial)
        if widths is None:
            continue
        # (input, weight, bias, stride, padding, dilation, groups)
        defaults = (None, [1] * spatial, [0] * spatial)
        arguments: list[Any] = [*node.args, *defaults[max(0, len(node.args) - 2) :]]
        own = per_axis(arguments[4], spatial)
        arguments[0] = x.args[0]
        arguments[4] = [old + new for old, new in zip(own, widths, strict=True)]
        node.args = tuple(arguments)
    graph.eliminate_dead_code()


def _symmetric_widths(node: fx.Node, spatial: int) -> list[int] | None:
    """Return how many zeros a node adds at both ends of each spatial axis, if that is all it does.

    Its widths are written as (before, after) of the last axis, then of the one before it.
    """
    if operators.name_of(node) not in operators.PADS:
        return None
    ends: Any = node.args[1]
    others = [*node.args[2:], *node.kwargs.values()]
    with_zeros = all(value in ("constant", None, 0) for value in others)
    if not with_zeros or len(ends) > 2 * spatial:
        return None
    if not all(type(end) is int and end >= 0 for end in ends) or ends[::2] != ends[1::2]:
        return None
    return [0] * (spatial - len(ends) // 2) + list(ends[::2])[::-1]
