"""A graph in segments, of which some are computed again in the backward pass (arXiv 1604.06174).

Autograd saves the inputs of such a segment instead of all tensors inside, and the backward pass
computes these again. The results are identical to the bit: the operators, their inputs and the
order in which gradients are summed do not change.
"""

import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from gdfq.execution.budget import MemoryBudget
from gdfq.graph.memory import gradient_bytes, kept_bytes, tensor_bytes


@dataclass(frozen=True, eq=False)
class Segment:
    """Consecutive nodes of a graph.

    Attributes:
        nodes: Its nodes, of the graph that was cut.
        inputs: The nodes before it that it reads.
        outputs: Its nodes that later nodes read.
    """

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]

    def module(self, root: fx.GraphModule) -> fx.GraphModule:
        """Return a network that computes the outputs from the inputs, with the tensors of root."""
        graph = fx.Graph()
        new = {node: graph.placeholder(node.name) for node in self.inputs}
        for node in self.nodes:
            for source in node.all_input_nodes:
                if source not in new:  # a weight may be a node of any segment
                    new[source] = graph.node_copy(source)
            new[node] = graph.node_copy(node, new.__getitem__)
        graph.output(tuple(new[node] for node in self.outputs))
        return fx.GraphModule(root, graph)


def segments(graph: fx.Graph, ends: Collection[fx.Node]) -> list[Segment]:
    """Cut a graph after each of the given nodes."""
    parts: list[list[fx.Node]] = [[]]
    ended = False
    for node in graph.nodes:
        if node.op in {"placeholder", "output", "get_attr"}:
            continue
        # The members of a tuple stay with it: what passes from one segment to the next is tensors.
        if ended and node.target is not operator.getitem:
            parts.append([])
            ended = False
        parts[-1].append(node)
        ended = ended or node in ends
    place = {node: index for index, part in enumerate(parts) for node in part}
    return [_segment(part, index, place) for index, part in enumerate(parts) if part]


def _segment(part: Sequence[fx.Node], index: int, place: Mapping[fx.Node, int]) -> Segment:
    sources = dict.fromkeys(source for node in part for source in node.all_input_nodes)
    inputs = [s for s in sources if s.op != "get_attr" and place.get(s, -1) != index]
    outputs = [n for n in part if any(place.get(user, -1) != index for user in n.users)]
    return Segment(tuple(part), tuple(inputs), tuple(outputs))


def recomputed_segments(
    parts: Sequence[Segment],
    sizes: Mapping[fx.Node, int],
    kept: Mapping[fx.Node, int],
    room: float,
) -> tuple[frozenset[int], int]:
    """Choose the segments to compute again so that an image needs at most `room` bytes.

    The largest come first: large feature maps cost little arithmetic for each byte that they save.
    A segment is computed again only if that saves a part of what it keeps: its inputs are held.

    Args:
        parts: All segments in order.
        sizes: The bytes of each node's tensor for one image.
        kept: Those of them that autograd keeps where nothing is computed again.
        room: Bytes for an image, forward and backward.

    Returns:
        The indices of the segments, and the bytes that an image needs then: more than `room` where
        no choice suffices.
    """
    inside = [sum(kept.get(node, 0) for node in part.nodes) for part in parts]

    def held(chosen: Collection[int]) -> int:
        """Return the bytes from the forward pass to the backward pass."""
        once = (part.nodes for index, part in enumerate(parts) if index not in chosen)
        found = {node: kept.get(node, 0) for nodes in once for node in nodes}
        for index in chosen:
            found |= {node: sizes.get(node, 0) for node in parts[index].inputs}
        return sum(found.values())

    def needed(chosen: Collection[int]) -> int:
        again = max((inside[index] for index in chosen), default=0)
        return held(chosen) + again + gradient_bytes(sizes)

    chosen: frozenset[int] = frozenset()
    for index in sorted(range(len(parts)), key=lambda i: -inside[i]):
        if needed(chosen) <= room:
            break
        if held(chosen) - held(chosen | {index}) > _LEAST_GAIN * inside[index]:
            chosen |= {index}
    return chosen, needed(chosen)


_LEAST_GAIN = 0.25
"""Of the bytes that a segment keeps: for less it is not computed twice."""


class SegmentedNetwork(nn.Module):
    """Computes what a network does, segment by segment, some of them twice.

    Args:
        network: The network that was cut; its tensors are shared.
        parts: Its segments.
        recomputed: The indices of those that are computed again in the backward pass.
    """

    def __init__(
        self, network: fx.GraphModule, parts: Sequence[Segment], recomputed: Collection[int]
    ) -> None:
        super().__init__()
        self._parts, self._recomputed = parts, frozenset(recomputed)
        self._modules_of = nn.ModuleList(part.module(network) for part in parts)
        (self._input,) = network.graph.find_nodes(op="placeholder")
        (output,) = network.graph.find_nodes(op="output")
        self._outputs = output.args[0]
        last: dict[fx.Node, int] = {}
        for index, part in enumerate(parts):
            last |= dict.fromkeys(part.inputs, index)
        returned = set(output.all_input_nodes)
        self._finished = [
            [node for node, at in last.items() if at == index and node not in returned]
            for index in range(len(parts))
        ]

    def forward(self, images: Tensor) -> Any:
        """Return what the network returns for images [N, *input_shape]."""
        values: dict[fx.Node, Any] = {self._input: images}
        for index, (part, module) in enumerate(zip(self._parts, self._modules_of, strict=True)):
            inputs = [values[node] for node in part.inputs]
            if index in self._recomputed and torch.is_grad_enabled():
                found = checkpoint(module, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                found = module(*inputs)
            values.update(zip(part.outputs, found, strict=True))
            for node in self._finished[index]:
                del values[node]
        return fx.node.map_arg(self._outputs, values.__getitem__)


class BudgetedNetwork:
    """A network whose backward pass stays within a memory budget, whatever the batch.

    A batch that fits passes the network as it is. For a larger one, as many segments as needed are
    computed again in the backward pass. The network must give the same values when it is computed
    again: it draws no random numbers.

    Args:
        network: Takes images and returns any structure of tensors.
        ends: Nodes of its graph after which it may be cut.
        budget: The memory budget.
        device: Where the network is.
    """

    def __init__(
        self,
        network: fx.GraphModule,
        ends: Collection[fx.Node],
        budget: MemoryBudget,
        device: torch.device,
    ) -> None:
        self._network, self._ends = network, ends
        self._budget, self._device = budget, device
        self._sizes, self._kept = tensor_bytes(network.graph), kept_bytes(network.graph)
        self._needed = sum(self._kept.values()) + gradient_bytes(self._sizes)
        self._by_count: dict[int, Callable[[Tensor], Any]] = {}

    def __call__(self, images: Tensor) -> Any:
        """Return what the network returns for images [N, *input_shape]."""
        count = len(images)
        if not torch.is_grad_enabled() or count <= self._budget.images(self._needed, self._device):
            return self._network(images)
        if count not in self._by_count:
            self._by_count[count] = self._segmented(count)
        return self._by_count[count](images)

    def _segmented(self, count: int) -> SegmentedNetwork:
        graph, room = self._network.graph, self._budget.room(self._device) / count
        ends = [node for node in graph.nodes if node in self._ends]
        # Long segments hold less between them, and more while one is computed again.
        lengths = [1 << i for i in range(max(1, len(ends).bit_length()))]
        found = []
        for length in lengths:
            parts = segments(graph, ends[length - 1 :: length])
            chosen, needed = recomputed_segments(parts, self._sizes, self._kept, room)
            found.append((needed, parts, chosen))
            if needed <= room:
                break
        _, parts, chosen = min(found, key=lambda choice: choice[0])
        return SegmentedNetwork(self._network, parts, chosen)
