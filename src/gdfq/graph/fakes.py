"""New nodes of exported graphs, with the fake tensors that describe their values."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import fx

from gdfq.graph import operators


def value_of(node: fx.Node) -> Any:
    """Return the fake tensor, number or tuple of them that describes a node's value."""
    return node.meta["val"]


def evaluate_(node: fx.Node) -> None:
    """Set the description of a node's value from those of its inputs."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), value_of)
    target: Any = node.target
    with _fake_mode(node.graph):
        node.meta["val"] = target(*args, **kwargs)


def call(
    before: fx.Node, operator: str, *args: Any, kwargs: Mapping[str, Any] | None = None
) -> fx.Node:
    """Add a call of an operator before a node, with the description of its value."""
    with before.graph.inserting_before(before):
        node = before.graph.call_function(operators.function_of(operator), args, dict(kwargs or {}))
    node.meta = {key: value for key, value in before.meta.items() if key != "val"}
    evaluate_(node)
    return node


def _fake_mode(graph: fx.Graph) -> AbstractContextManager[Any]:
    for node in graph.nodes:
        mode = getattr(node.meta.get("val"), "fake_mode", None)
        if mode is not None:
            return mode  # type: ignore[no-any-return]
    return nullcontext()
