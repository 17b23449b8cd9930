"""The bytes that a graph's activations take per image, from which batches fit a `MemoryBudget`."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, fx

from gdfq.execution.budget import MemoryBudget
from gdfq.functional.fixed_convolution import fixed_convolution
from gdfq.graph import operators, queries


def tensor_bytes(graph: fx.Graph) -> dict[fx.Node, int]:
    """Return the bytes of each node's tensor for one image.

    Weights and numbers have none. A node of unknown shape, such as a quantizer, has the bytes of
    its largest input.
    """
    found: dict[fx.Node, int] = {}
    images = max(1, _batch_size(graph))
    for node in graph.nodes:
        value = node.meta.get("val")
        if node.op in {"call_module", "call_function"} and value is None:
            found[node] = max((found.get(source, 0) for source in node.all_input_nodes), default=0)
        elif node.op in {"placeholder", "call_function"} and isinstance(value, Tensor):
            count = math.prod(map(int, value.shape))
            found[node] = count * _bytes_per_element(value.dtype) // images
    return found


def forward_bytes(graph: fx.Graph) -> int:
    """Return the peak bytes of activations for one image while the graph runs without gradients.

    A tensor is alive from the node that makes it to the last node that reads it. Work space is
    added: a quantizer has two more tensors of its size while it computes.
    """
    sizes = tensor_bytes(graph)
    last_use: dict[fx.Node, list[fx.Node]] = {}
    seen: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        for source in node.all_input_nodes:
            if source not in seen:
                seen.add(source)
                last_use.setdefault(node, []).append(source)
    alive = peak = 0
    for node in graph.nodes:
        alive += sizes.get(node, 0)
        peak = max(peak, alive)
        alive -= sum(sizes.get(source, 0) for source in last_use.get(node, []))
    return peak + 2 * max(sizes.values(), default=0)


def training_bytes(graph: fx.Graph) -> int:
    """Return the bytes that one image takes in a forward and backward pass.

    Autograd saves all activations at most.
    """
    sizes = tensor_bytes(graph)
    return sum(sizes.values()) + gradient_bytes(sizes)


def gradient_bytes(sizes: Mapping[fx.Node, int]) -> int:
    """Return what a backward pass adds: a gradient of the largest tensor and one of its input."""
    return 2 * max(sizes.values(), default=0)


def kept_bytes(graph: fx.Graph) -> dict[fx.Node, int]:
    """Return the bytes for one image of each node's tensor that the backward pass needs.

    A tensor is not needed if neither what makes it nor what reads it keeps it. Beside a maximum
    the places are kept where it was found, in 64 bits.
    """
    found = {}
    for node, size in tensor_bytes(graph).items():
        is_needed = not all(map(_keeps_nothing, (node, *node.users)))
        places = operators.name_of(node) in operators.MAX_POOLING
        found[node] = size * is_needed + 2 * size * places
    return found


def _keeps_nothing(node: fx.Node) -> bool:
    """Return whether autograd keeps no activation for the gradient of an operator."""
    return node.target is fixed_convolution or queries.has_constant_gradient(node)


_FORWARD_SHARE = 4
"""A pass without gradients takes this part of the budget: more images at once are no faster."""


def forward_images(graph: fx.Graph, budget: MemoryBudget, device: torch.device) -> int:
    """Return how many images pass a graph at once without gradients."""
    return budget.images(_FORWARD_SHARE * forward_bytes(graph), device)


_COMPARISON_SHARE = 6
"""Two networks run node by node, and a comparison holds copies of a tensor in 64 bits."""


def compared_images(graph: fx.Graph, budget: MemoryBudget, device: torch.device) -> int:
    """Return how many images pass two networks of a graph at once to compare all their tensors."""
    return budget.images(_COMPARISON_SHARE * forward_bytes(graph), device)


_PART_SHARE = 2
"""Of a batch that passes layer by layer, whose tensors are held for all images, the work space."""


def part_images(graph: fx.Graph, count: int, budget: MemoryBudget, device: torch.device) -> int:
    """Return how many of a batch's images make a part where all parts pass layer by layer.

    See `gdfq.graph.walk.PartsInterpreter`. A batch that fits is one part.
    """
    fits = forward_images(graph, budget, device)
    return count if count <= fits else max(1, fits // _PART_SHARE)


def _batch_size(graph: fx.Graph) -> int:
    sizes = [
        int(node.meta["val"].shape[0])
        for node in graph.find_nodes(op="placeholder")
        if isinstance(node.meta.get("val"), Tensor) and node.meta["val"].ndim
    ]
    return sizes[0] if sizes else 1


def _bytes_per_element(dtype: torch.dtype) -> int:
    return torch.empty((), dtype=dtype).element_size()
