"""A network run node by node, so that what is measured on the way need not be kept."""

from collections.abc import Iterator
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
