"""Networks that run node by node, so that tensors can be measured and then freed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx


@dataclass(frozen=True)
class Visit:
    """A node that has just run, with its inputs and its value."""

    node: fx.Node
    inputs: tuple[Any, ...]
    value: Any


class Walk(fx.Interpreter):
    """Runs a graph node by node and frees values after their last use."""

    def visits(self, *inputs: Tensor) -> Iterator[Visit]:
        """Yield each operator once, in order, for one tensor per input of the network."""
        self.env = {}
        self.args_iter = iter(inputs)
        for node in self.graph.nodes:
            arguments, _ = self.fetch_args_kwargs_from_env(node)
            with torch.no_grad():
                self.env[node] = self.run_node(node)
            if node.op == "call_function":
                yield Visit(node, arguments, self.env[node])
            for finished in self.user_to_last_uses.get(node, []):
                del self.env[finished]


class PartsInterpreter(fx.Interpreter):
    """Runs a graph on a batch in parts: all parts pass a node before the first passes the next.

    A value computed from the whole batch can therefore change later nodes. Only tensors that later
    nodes read stay in memory, with the work space of one part.
    """

    def run_parts(self, parts: Sequence[Sequence[Tensor]]) -> None:
        """Run on parts [n, *shape] of each input; nothing is returned."""
        for _ in self.nodes_of_parts(parts):
            pass

    def nodes_of_parts(
        self, parts: Sequence[Sequence[Tensor]]
    ) -> Iterator[tuple[fx.Node, Sequence[dict[fx.Node, Any]]]]:
        """Run as `run_parts`, and yield each node when all parts have passed it."""
        arguments = list(map(iter, parts))
        envs: list[dict[fx.Node, Any]] = [{} for _ in parts]
        for node in self.graph.nodes:
            if node.op == "output":
                return
            self.before(node, envs)
            for env, iterator in zip(envs, arguments, strict=True):
                self.env, self.args_iter = env, iterator
                env[node] = self.run_node(node)
                for finished in self.user_to_last_uses.get(node, []):
                    del env[finished]
            self.after(node, envs)
            yield node, envs

    def before(self, node: fx.Node, envs: Sequence[dict[fx.Node, Any]]) -> None:
        """Read the inputs of a node in each part, or change the node's module."""

    def after(self, node: fx.Node, envs: Sequence[dict[fx.Node, Any]]) -> None:
        """Read the value of a node in each part, or replace it."""
