"""Shapes of all tensors of a network, the batch being a number that no other length divides."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from gdfq.deploy.litert.layout import BATCH
from gdfq.graph import operators
from gdfq.graph.inputs import InputSpec

_CREATIONS = frozenset(map(operators.resolve, operators.CREATIONS))


def values_by_node(module: fx.GraphModule, inputs: Sequence[InputSpec]) -> dict[fx.Node, Any]:
    """Return the value of each node: tensors without data, and sizes as numbers.

    Args:
        module: The graph.
        inputs: Specifications of its inputs.
    """
    walk = _Shapes(module)
    with torch.no_grad():
        walk.run(*(spec.zeros(BATCH, "meta") for spec in inputs))
    return walk.values


class _Shapes(fx.Interpreter):
    """Runs a graph on PyTorch's meta device, whose tensors only have shapes."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.values: dict[fx.Node, Any] = {}

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value: Tensor = super().get_attr(target, args, kwargs)
        return value.to("meta")

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in _CREATIONS:
            kwargs = {**kwargs, "device": "meta"}
        return super().call_function(target, args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        self.values[n] = value = super().run_node(n)
        return value
