"""A network run node by node, so that what is measured on the way need not be kept."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx


@dataclass(frozen=True)
class Visit:
    """A node that has just run: the values that entered it, and its own."""

    node: fx.Node
    inputs: tuple[Any, ...]
    value: Any


class Walk(fx.Interpreter):
    """Runs a graph step by step; what nothing needs any more is dropped."""

    def visits(self, *inputs: Tensor) -> Iterator[Visit]:
        """Each operator in order, once, for a tensor for each input of the network."""
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

    So what is computed from a tensor of the whole batch can change the nodes behind it, while only
    what those still read is held, and work space is that of one part.
    """

    def run_parts(self, parts: Sequence[Sequence[Tensor]]) -> None:
        """Run on parts [n, *shape] of each input; nothing is returned."""
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

    def before(self, node: fx.Node, envs: Sequence[dict[fx.Node, Any]]) -> None:
        """Look at what enters a node, by part, or change the node's module."""

    def after(self, node: fx.Node, envs: Sequence[dict[fx.Node, Any]]) -> None:
        """Look at what a node has made, by part, or put something else in its place."""
