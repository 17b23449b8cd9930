"""Copies of graphs in which some nodes are changed."""

from collections.abc import Callable
from typing import Any

from torch import fx


class Copy:
    """A graph under construction, and the mapping from the original's nodes to its own."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self._new: dict[fx.Node, fx.Node] = {}

    def __getitem__(self, node: fx.Node) -> fx.Node:
        """Return the node that replaces a node of the original."""
        return self._new[node]

    def __setitem__(self, node: fx.Node, new: fx.Node) -> None:
        self._new[node] = new

    def of(self, node: fx.Node) -> fx.Node:
        """Return a copy of the node with the same arguments."""
        return self.graph.node_copy(node, self.__getitem__)

    def output(self, value: Any) -> fx.Node:
        """Make the copy return a value of its own nodes."""
        node: fx.Node = self.graph.output(value)
        return node

    def mapped(self, arguments: Any) -> Any:
        """Return arguments with each node of the original replaced by its copy."""
        return fx.node.map_arg(arguments, self.__getitem__)


Change = Callable[[Copy, fx.Node], fx.Node | None]
"""Writes the replacement of a node into the copy and returns it; None copies the node as it is."""


def rewrite(source: fx.Graph, change: Change) -> fx.Graph:
    """Copy a graph with some nodes changed; metadata of copied nodes is kept."""
    copy = Copy()
    for node in source.nodes:
        changed = change(copy, node)
        copy[node] = copy.of(node) if changed is None else changed
    return copy.graph
