"""The harm that each layer does when it alone is rounded, all others being the teacher's."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from gdfq.analysis.bit_allocation import divergence
from gdfq.analysis.preflight import layer_operations
from gdfq.functional.grid import fake_quantize
from gdfq.graph import queries
from gdfq.graph.capture import Captured
from gdfq.graph.queries import weights_of
from gdfq.graph.walk import Walk
from gdfq.quantizers.lsq import best_weight_grid
from gdfq.student.integer_network import IntegerNetwork

_OPERATIONS = 6 * 10**10
"""Multiply-accumulates that all divergences may cost together: some seconds of one core."""
_FEWEST = 4
"""Images that a divergence is taken from."""

Grid = tuple[Tensor, Tensor, int]
Rounded = Callable[[fx.Node, tuple[Any, ...]], tuple[Any, ...]]
"""A layer and what enters it (input, weight, ...) -> the same, rounded."""


@dataclass(frozen=True)
class Harm:
    """What each layer does, by the name of its node.

    kind: "divergence" is that of the network's outputs
    (`gdfq.analysis.bit_allocation.divergence`), which takes
    a run of the network for each layer; where that costs too much it is "error", that of the
    layer's own output: Σ (y − y_q)² / Σ y².
    """

    kind: Literal["divergence", "error"]
    of: Mapping[str, float]


def measure_harm(teacher: Captured, network: IntegerNetwork, *inputs: Tensor) -> Harm:
    """Round the teacher's layers one at a time, as a student has them quantized.

    teacher: with folded batch norms; network: its frozen student, which gives the width of each
    weight, rounded to its best grid, and the grid of each layer's input. Layers that are float
    have no harm. inputs: [N, *shape] for each input; few of them where runs are dear.
    """
    weights = weights_of(teacher.network)
    widths: dict[fx.Node, int] = {}
    grids: dict[fx.Node, Grid | None] = {}
    for node, layer in zip(weights, network.layers, strict=True):
        if layer.bits is not None:
            widths[node] = layer.bits
            grids[node] = None if layer.input is None else layer.input.grid

    def rounded(node: fx.Node, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x, weight, *rest = inputs
        bits, grid = widths[node], grids[node]
        best = best_weight_grid(weight, bits, *queries.weight_layout(node))
        x = x if grid is None else fake_quantize(x, *grid)
        return (x, fake_quantize(weight, *best, bits), *rest)

    cost = len(widths) * sum(layer_operations(node, weight) for node, weight in weights.items())
    images = len(inputs[0])
    count = min(images, _OPERATIONS // max(1, cost))
    if count < min(_FEWEST, images):
        return Harm("error", _errors(teacher.network, set(widths), rounded, inputs))
    loss, few = divergence(teacher), tuple(tensor[:count] for tensor in inputs)
    with torch.no_grad():
        wanted = teacher.network(*few)
        return Harm(
            "divergence",
            {
                node.name: float(
                    loss(_OneRounded(teacher.network, node, rounded).run(*few), wanted)
                )
                for node in widths
            },
        )


class _OneRounded(fx.Interpreter):
    """Runs a network with one layer rounded."""

    def __init__(self, network: fx.GraphModule, layer: fx.Node, rounded: Rounded) -> None:
        super().__init__(network)
        self.layer, self.rounded = layer, rounded

    def run_node(self, n: fx.Node) -> Any:
        if n is not self.layer:
            return super().run_node(n)
        inputs, keywords = self.fetch_args_kwargs_from_env(n)
        return n.target(*self.rounded(n, inputs), **keywords)  # type: ignore[operator]


def _errors(
    network: fx.GraphModule, layers: set[fx.Node], rounded: Rounded, inputs: Sequence[Tensor]
) -> dict[str, float]:
    """Σ (y − y_q)² / Σ y² of each layer's output y, and y_q when its inputs are rounded."""
    errors = {}
    for visit in Walk(network).visits(*inputs):
        if visit.node in layers:
            function: Any = visit.node.target
            other = function(*rounded(visit.node, visit.inputs), **visit.node.kwargs)
            power = visit.value.double().square().sum().clamp_min(1e-300)
            errors[visit.node.name] = float((other - visit.value).double().square().sum() / power)
    return errors
