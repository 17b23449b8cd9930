"""A network run node by node, so that what is measured on the way need not be kept."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from gdfq.graph import operators


@dataclass(frozen=True)
class Visit:
    """A node that has just run: the values that entered it, and its own."""

    node: fx.Node
    inputs: tuple[Any, ...]
    value: Any


class Walk(fx.Interpreter):
    """Runs a graph step by step; what nothing needs any more is dropped."""

    def visits(self, images: Tensor) -> Iterator[Visit]:
        """Each operator in order, once, for images [N, *input_shape]."""
        self.env = {}
        self.args_iter = iter([images])
        for node in self.graph.nodes:
            inputs, _ = self.fetch_args_kwargs_from_env(node)
            with torch.no_grad():
                self.env[node] = self.run_node(node)
            if node.op == "call_function":
                yield Visit(node, inputs, self.env[node])
            for finished in self.user_to_last_uses.get(node, []):
                del self.env[finished]


def weight_bits(layer: fx.Node) -> int | None:
    """The bits of a layer's weight in a frozen student's graph; None if it is float."""
    weight = layer.args[1]
    if isinstance(weight, fx.Node) and operators.name_of(weight) == operators.DEQUANTIZE:
        bits = weight.args[3]
        assert isinstance(bits, int)
        return bits
    return None
