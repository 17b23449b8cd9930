"""The ends of a network's blocks, and networks that also return the features there.

A feature is a tensor that all paths from the input to the outputs pass through. A block lies
between two features: the residual block of a ResNet, a layer of a plain network. A student with the
teacher's features computes the same function as the teacher.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx

from gdfq.errors import UsageError
from gdfq.graph import operators, queries
from gdfq.graph.rewrite import Copy, rewrite

WithFeatures = Callable[..., tuple[Any, Sequence[Tensor]]]
"""A tensor for each input -> what the network returns, and one feature per block."""


def block_ends(graph: fx.Graph) -> list[fx.Node]:
    """Return a graph's features in order: each block's last tensor before pooling or reshape."""
    # Numbers such as a batch size do not count: every image has the same.
    nodes = [node for node in graph.nodes if queries.depends_on_inputs(node)]
    outputs = set(queries.outputs(graph))
    position = {node: i for i, node in enumerate(nodes)}
    last_use = [
        max(
            (position[u] for u in node.users if u in position and not queries.is_new(u)), default=-1
        )
        for node in nodes
    ]
    ends: list[fx.Node] = []
    candidate: fx.Node | None = None
    has_layer, alive_until = False, -1
    for i, node in enumerate(nodes):
        is_layer = queries.has_weight(node)
        if is_layer and candidate is not None:  # the next block begins
            ends.append(candidate)
            candidate, has_layer = None, False
        if node in outputs:
            break
        has_layer = has_layer or is_layer
        if has_layer and alive_until <= i and _may_end(node):
            candidate = node
        alive_until = max(alive_until, last_use[i])
    return ends


def _may_end(node: fx.Node) -> bool:
    reduces = queries.keeps_grid(node) or operators.name_of(node) in operators.POOLING
    return queries.is_activation(node) and not reduces


def with_features(network: fx.GraphModule, nodes: Sequence[fx.Node]) -> fx.GraphModule:
    """Return a network that also returns the values of some nodes; it shares all tensors."""

    def change(copy: Copy, node: fx.Node) -> fx.Node | None:
        if node.op != "output":
            return None
        return copy.output((copy.mapped(node.args[0]), [copy[feature] for feature in nodes]))

    return fx.GraphModule(network, rewrite(network.graph, change))


def blocks(network: fx.GraphModule, ends: Sequence[fx.Node]) -> list[fx.GraphModule]:
    """Cut a network at features; its parts, called in order, compute the same function.

    The first part takes all inputs of the network, and each other part the output of the one before
    it. The parts share its tensors and modules. There is one more part than there are ends.

    Raises:
        UsageError: The network has several outputs.
    """
    outputs = queries.outputs(network.graph)
    if len(outputs) > 1:
        raise UsageError(
            "a network is cut into blocks towards its one output; this one has "
            f"{len(outputs)}. Use recipe 'fast'."
        )
    starts: list[fx.Node | None] = [None, *ends]
    return [
        _between(network, start, end) for start, end in zip(starts, [*ends, *outputs], strict=True)
    ]


def _between(network: fx.GraphModule, start: fx.Node | None, end: fx.Node) -> fx.GraphModule:
    """Return the part of a network that computes one node from another, or from the inputs."""
    needed = {end}
    for node in reversed(network.graph.nodes):
        if node not in needed or node is start or queries.is_batch_size(node):
            continue
        # What takes the device from the network's input may take it from the part's.
        needed.update(node.all_input_nodes[1 if queries.is_new(node) else 0 :])
    graph = fx.Graph()
    starts = queries.inputs(network.graph) if start is None else [start]
    new: dict[fx.Node, fx.Node] = {
        node: graph.placeholder(f"x{i}") for i, node in enumerate(starts)
    }
    x = new[starts[0]]
    for node in network.graph.nodes:
        if node in starts:
            continue
        if node in needed and queries.is_batch_size(node):  # of any tensor the same
            new[node] = graph.call_function(node.target, (x, 0))
        elif node in needed and queries.is_new(node):
            new[node] = graph.node_copy(node, lambda source: new.get(source, x))
        elif node in needed:
            new[node] = graph.node_copy(node, new.__getitem__)
    graph.output(new[end])
    return fx.GraphModule(network, graph)
