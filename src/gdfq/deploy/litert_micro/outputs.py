"""Outputs on grids of 8 bits: files for microcontrollers return codes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from gdfq.functional.grid import MAX_BITS, affine_grid
from gdfq.graph import operators, queries
from gdfq.graph.operators import name_of
from gdfq.graph.rewrite import Copy
from gdfq.graph.tensors import flat_module
from gdfq.student.integer_network import IntegerNetwork


@torch.no_grad()
def with_output_grids(
    network: IntegerNetwork, names: Sequence[str], values: Sequence[Tensor]
) -> tuple[IntegerNetwork, list[str]]:
    """Return a network whose outputs are on grids, and the names of these grids in order.

    An output that another operator reads on a grid is returned on this one. Every other output is
    rounded to 8 bits, over the range of its values.

    Args:
        network: The integer network.
        names: Names of its outputs.
        values: Values of each output.
    """
    tensors = dict(network.tensors)
    grids = {grid.node: grid.name for grid in network.activations}
    copy, chosen = Copy(), []
    new: dict[fx.Node, tuple[fx.Node, str]] = {}
    for node in network.graph.nodes:
        if node.op != "output":
            copy[node] = copy.of(node)
    for name, node, found in zip(names, queries.outputs(network.graph), values, strict=True):
        known = _rounded(node)
        if known is not None:
            chosen.append((copy[known], grids[queries.grid_source(known)]))
            continue
        if node not in new:
            while name in grids.values():
                name = f"{name}_"
            low, high = found.min().clamp(max=0), found.max().clamp(min=0)
            scale, zero_point = affine_grid(low, high, MAX_BITS)
            constants = []
            for part, value in (("scale", scale), ("zero_point", zero_point)):
                tensors[f"outputs.{name}.{part}"] = value
                constants.append(copy.graph.get_attr(f"outputs.{name}.{part}"))
            rounding = operators.resolve(operators.FAKE_QUANTIZE)
            arguments: Any = (copy[node], *constants, MAX_BITS)
            new[node] = copy.graph.call_function(rounding, arguments), name
        chosen.append(new[node])
    results = [node for node, _ in chosen]
    copy.output(tuple(results) if len(results) > 1 else results[0])
    return IntegerNetwork(flat_module(copy.graph, tensors)), [name for _, name in chosen]


def _rounded(node: fx.Node) -> fx.Node | None:
    """Return the node that holds an output on a grid, or None."""
    if name_of(queries.grid_source(node)) == operators.FAKE_QUANTIZE:
        return node
    readers = [user for user in node.users if name_of(user) == operators.FAKE_QUANTIZE]
    return readers[0] if readers else None
