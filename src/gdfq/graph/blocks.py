"""The ends of a network's blocks, and networks that also return the features there.

A feature is a tensor that all paths from the input to the outputs pass through. A block lies
between two features: the residual block of a ResNet, a layer of a plain network. A student with the
teacher's features computes the same function as the teacher.

A U-Net has hardly any: its skips pass around everything between them, and its time step enters each
residual block. Across skips, blocks also end where the only other tensors that are still needed are
the ends of blocks that a concatenation reads, and what does not depend on the image.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from gdfq.errors import UsageError
from gdfq.graph import operators, queries
from gdfq.graph.rewrite import Copy, rewrite

WithFeatures = Callable[..., tuple[Any, Sequence[Tensor]]]
"""A tensor for each input -> what the network returns, and one feature per block."""


def block_ends(graph: fx.Graph, *, across_skips: bool = False) -> list[fx.Node]:
    """Return a graph's features in order: each block's last tensor before pooling or reshape.

    Args:
        graph: The graph of a network.
        across_skips: Ends that later parts of the network read in concatenations may stay alive,
            and what depends on other inputs than the first.
    """
    # Numbers such as a batch size do not count: every image has the same.
    nodes = [node for node in graph.nodes if queries.depends_on_inputs(node)]
    if across_skips:
        of_image = queries.computed_from(queries.inputs(graph)[0])
        nodes = [node for node in nodes if node in of_image]
    outputs = set(queries.outputs(graph))
    position = {node: i for i, node in enumerate(nodes)}

    def last_use(node: fx.Node, *, by_joins: bool = True) -> int:
        return max(
            (
                position[user]
                for user in node.users
                if user in position
                and not queries.is_new(user)
                and (by_joins or operators.name_of(user) != operators.CONCATENATE)
            ),
            default=-1,
        )

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
        needed_until = last_use(node)
        if has_layer and alive_until <= i and _may_end(node):
            candidate = node
            others = last_use(node, by_joins=False)
            if across_skips and others < needed_until:  # a skip begins
                ends.append(node)
                candidate, has_layer, needed_until = None, False, others
        alive_until = max(alive_until, needed_until)
    return ends


def cuts(network: fx.GraphModule) -> list[fx.Node]:
    """Return where a network may be cut: at the ends of its blocks, or after layers."""
    return block_ends(network.graph) or queries.weighted_layers(network)


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


@dataclass(frozen=True, eq=False)
class Block:
    """A part of a network.

    Attributes:
        network: Computes the end of the block; it shares tensors and modules with the whole.
        takes: The tensors that it takes: their places among the inputs of the whole network,
            followed by the ends of all blocks.
    """

    network: fx.GraphModule
    takes: tuple[int, ...]


def blocks(network: fx.GraphModule, ends: Sequence[fx.Node]) -> list[Block]:
    """Cut a network at the ends of its blocks, and before its output.

    Computed in order, the blocks are the network. There is one more block than there are ends, and
    its end is the output.

    Raises:
        UsageError: The network has several outputs.
    """
    outputs = queries.outputs(network.graph)
    if len(outputs) > 1:
        raise UsageError(
            "a network is cut into blocks towards its one output; this one has "
            f"{len(outputs)}. Use recipe 'fast'."
        )
    known, cut = queries.inputs(network.graph), [*ends, *outputs]
    return [_block(network, [*known, *cut[:place]], end) for place, end in enumerate(cut)]


def _block(network: fx.GraphModule, known: Sequence[fx.Node], end: fx.Node) -> Block:
    """Return the part of a network that computes one node from some of the known ones."""
    needed = {end}
    for node in reversed(network.graph.nodes):
        if node not in needed or node in known or queries.is_batch_size(node):
            continue
        # What takes the device from the network's input may take it from the part's.
        needed.update(node.all_input_nodes[1 if queries.is_new(node) else 0 :])
    graph = fx.Graph()
    takes = tuple(place for place, node in enumerate(known) if node in needed)
    new: dict[fx.Node, fx.Node] = {
        known[place]: graph.placeholder(f"x{i}") for i, place in enumerate(takes)
    }
    x = new[known[takes[0]]]
    for node in network.graph.nodes:
        if node in known:
            continue
        if node in needed and queries.is_batch_size(node):  # of any tensor the same
            new[node] = graph.call_function(node.target, (x, 0))
        elif node in needed and queries.is_new(node):
            new[node] = graph.node_copy(node, lambda source: new.get(source, x))
        elif node in needed:
            new[node] = graph.node_copy(node, new.__getitem__)
    graph.output(new[end])
    return Block(fx.GraphModule(network, graph), takes)
