"""Constants of exported graphs: nodes that depend on tensors of the network alone."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from gdfq.graph import operators
from gdfq.graph.tensors import attribute


@dataclass(frozen=True, eq=False)
class Constant:
    """The value of a node, and what it is made from.

    Attributes:
        value: A tensor, a number, or a tuple of them.
        sources: The tensors of the network that it depends on, in order of their first use.
        operators: The names of the operators that compute it.
        numbers: The numbers that these operators take.
    """

    value: Any
    sources: tuple[fx.Node, ...] = ()
    operators: frozenset[str] = frozenset()
    numbers: frozenset[float] = frozenset()


def constants_of(module: fx.GraphModule) -> dict[fx.Node, Constant]:
    """Return the constants of a graph, in its order; nothing random is one."""
    known: dict[fx.Node, Constant] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            known[node] = Constant(attribute(module, str(node.target)), (node,))
            continue
        inputs = node.all_input_nodes
        function: Any = node.target
        is_random = torch.Tag.nondeterministic_seeded in getattr(function, "tags", ())
        if node.op != "call_function" or is_random or not all(n in known for n in inputs):
            continue
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: known[n].value)
        with torch.no_grad():
            value = function(*args, **kwargs)
        parts = [known[n] for n in inputs]
        known[node] = Constant(
            value,
            tuple(dict.fromkeys(source for part in parts for source in part.sources)),
            frozenset({operators.name_of(node)}).union(*(part.operators for part in parts)),
            frozenset(map(float, filter(_is_number, node.args))).union(
                *(part.numbers for part in parts)
            ),
        )
    return known


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
