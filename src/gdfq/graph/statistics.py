"""The teacher, returning its outputs and the moments of its batch norms' inputs."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from gdfq.errors import UsageError
from gdfq.execution.budget import MemoryBudget
from gdfq.execution.distributed import Statistics
from gdfq.functional.fixed_convolution import fixed_convolution
from gdfq.functional.moments import UNCLAMPED, input_moments, norm_with_moments
from gdfq.graph import operators, queries
from gdfq.graph.batch_norms import BatchNorm, batch_norm_of
from gdfq.graph.blocks import cuts
from gdfq.graph.capture import Captured
from gdfq.graph.recompute import BudgetedNetwork
from gdfq.graph.rewrite import Copy, rewrite
from gdfq.graph.tensors import tensors_of


class StatisticsNetwork:
    """The teacher, returning its outputs and the moments of its batch norms' inputs.

    Calling it with images [N, *input_shape] returns (what the teacher returns, statistics), where
    the statistics are tied to the batch-norm nodes themselves, not to hooks or an order of modules.
    `stored` holds the running statistics to compare with, in the same order. With `of_input` (mean
    and variance, [C] each) the images' own statistics come first, to be compared with these.

    Raises:
        UsageError: The network has no batch norm.
    """

    def __init__(
        self,
        teacher: Captured,
        *,
        of_input: tuple[Tensor, Tensor] | None = None,
        memory: MemoryBudget | None = None,
    ) -> None:
        if not teacher.batch_norms:
            if any(map(queries.normalises_batch, teacher.network.graph.nodes)):
                raise UsageError(
                    "images are made from the running statistics of batch norms; those of this "
                    "network keep none (track_running_stats=False). "
                    "Give real images (--data, or data=...), or use recipe 'patches'."
                )
            raise UsageError(
                "the batch-norm statistics loss needs batch norms; this network has none. "
                "Use recipe 'patches', or give real images (--data, or data=...)."
            )
        norms = _norms_of(teacher)
        self.stored: Statistics = [(norm.mean, norm.variance) for norm in norms]
        self._of_input = of_input is not None
        if of_input is not None:
            self.stored = [of_input, *self.stored]
        network, ends = _with_moments(teacher, norms)
        self._module: Callable[[Tensor], Any] = network
        if memory is not None:
            self._module = BudgetedNetwork(network, ends, memory, teacher.device)

    def __call__(self, images: Tensor) -> tuple[Any, Statistics]:
        outputs, statistics = self._module(images)
        if self._of_input:
            statistics = [input_moments(images), *statistics]
        return outputs, statistics


def first_moments(teacher: Captured) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Return what finds mean and variance [C] of the first batch norm's input for images.

    It runs the teacher up to that batch norm.
    """
    network, _ = _with_moments(teacher, _norms_of(teacher))
    (output,) = network.graph.find_nodes(op="output")
    _, observed = output.args[0]
    output.args = (observed[0],)
    network.graph.eliminate_dead_code()
    network.recompile()
    return network


def unit_input(teacher: Captured) -> tuple[Tensor, Tensor]:
    """Return mean 0 and variance 1 of each channel [C], the statistics of normalised inputs."""
    zero = torch.zeros(teacher.input_shape[0], device=teacher.device)
    return zero, torch.ones_like(zero)


def _norms_of(teacher: Captured) -> list[BatchNorm]:
    return [batch_norm_of(teacher, node) for node in teacher.batch_norms]


def _with_moments(
    teacher: Captured, norms: list[BatchNorm]
) -> tuple[fx.GraphModule, list[fx.Node]]:
    """Return a graph with outputs (outputs, [(mean, variance) of each batch norm's input]).

    A rectifier that alone reads a batch norm is part of it, and convolutions of fixed weights keep
    no input. The graph's nodes after which it may be cut are returned, too.
    """
    tensors = tensors_of(teacher.network)
    values = dict(zip(teacher.batch_norms, norms, strict=True))
    observed: list[tuple[fx.Node, fx.Node]] = []
    changed: dict[str, fx.Node] = {}

    def rectifier_of(norm: fx.Node) -> fx.Node | None:
        """Return the only reader of one of the batch norms, if it is a rectifier."""
        if norm not in values or len(norm.users) != 1:
            return None
        (reader,) = norm.users
        return reader if operators.name_of(reader) in operators.OPEN_CLAMPS else None

    def change(copy: Copy, node: fx.Node) -> fx.Node | None:
        graph = copy.graph
        if node in values:
            shape = (1, -1, *([1] * (node.meta["val"].ndim - 2)))
            names = (f"scale_of_{node.name}", f"shift_of_{node.name}")
            for name, value in zip(names, values[node].scale_and_shift(), strict=True):
                tensors[name] = value.view(shape)
            rectifier = rectifier_of(node)
            ends = UNCLAMPED if rectifier is None else queries.clamp_ends(rectifier)
            arguments: Any = (copy[queries.input_of(node)], *map(graph.get_attr, names), ends)
            triple = graph.call_function(norm_with_moments, arguments)
            y, mean, variance = (
                graph.call_function(operator.getitem, (triple, i)) for i in range(3)
            )
            observed.append((mean, variance))
            y.meta, changed[node.name] = dict(node.meta), y
            for moment in (mean, variance):
                moment.meta["val"] = torch.empty(len(values[node].mean), device="meta")
            triple.meta["val"] = tuple(part.meta["val"] for part in (y, mean, variance))
            return y
        if node.all_input_nodes and rectifier_of(node.all_input_nodes[0]) is node:
            changed[node.name] = copy[node.all_input_nodes[0]]
            return changed[node.name]
        if operators.name_of(node) in operators.PADDED_CONVOLUTIONS and queries.is_fixed(node):
            new = graph.call_function(fixed_convolution, copy.mapped(node.args), dict(node.kwargs))
            new.meta, changed[node.name] = dict(node.meta), new
            return new
        if node.op == "output":
            return copy.output((copy.mapped(node.args[0]), observed))
        return None

    graph = rewrite(teacher.network.graph, change)
    graph.eliminate_dead_code()
    by_name = {node.name: node for node in graph.nodes} | changed
    names = (end.name for end in cuts(teacher.network))
    return fx.GraphModule(tensors, graph), [by_name[name] for name in names if name in by_name]
