"""Layer sensitivity: the error when one layer alone is rounded and all others are the teacher's."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import add
from typing import Any, Literal

import torch
from torch import Tensor, fx

from gdfq.analysis.bit_allocation import divergence
from gdfq.analysis.operations import layer_operations
from gdfq.execution.budget import MemoryBudget
from gdfq.functional.float_grid import fake_quantize_float
from gdfq.functional.grid import fake_quantize
from gdfq.graph import queries
from gdfq.graph.capture import Captured
from gdfq.graph.memory import forward_images
from gdfq.graph.outputs import in_parts
from gdfq.graph.queries import weights_of
from gdfq.graph.walk import Walk
from gdfq.quantizers.float_lsq import best_weight_format
from gdfq.quantizers.lsq import best_weight_grid
from gdfq.sources.base import split_inputs
from gdfq.student.integer_network import ActivationGrid, IntegerNetwork, IntegerWeight

_MAX_OPERATIONS = 6 * 10**10
"""Multiply-accumulates of all divergences together: some seconds on one core."""
_MIN_IMAGES = 4
"""Fewest images for a divergence; with fewer the error of the layer's output is measured."""

RoundInputs = Callable[[fx.Node, tuple[Any, ...]], tuple[Any, ...]]
"""A layer and its inputs (activation, weight, ...) -> the same inputs, rounded."""


@dataclass(frozen=True)
class Sensitivity:
    """The sensitivity of each layer.

    Attributes:
        kind: "divergence" is that of the network's outputs
            (`gdfq.analysis.bit_allocation.divergence`). It takes one forward pass for each layer.
            Where that takes too long, it is "error": Σ (y − y_q)² / Σ y² of the layer's own
            output y, which takes one forward pass for all layers.
        by_layer: The sensitivity by the name of the layer's node.
    """

    kind: Literal["divergence", "error"]
    by_layer: Mapping[str, float]


def measure_sensitivity(
    teacher: Captured,
    network: IntegerNetwork,
    *inputs: Tensor,
    memory: MemoryBudget = MemoryBudget(),
) -> Sensitivity:
    """Round the teacher's layers one at a time, with the bits and input grids of the student.

    Args:
        teacher: The teacher with folded batch norms.
        network: Its integer network. Each weight is rounded with its bits to the best grid, and
            each layer's input to its grid. Float layers have no sensitivity.
        inputs: A tensor [N, *shape] for each input. Fewer rows are used where a forward pass takes
            many operations.
        memory: Budget for the images that pass together; the others pass after them.
    """
    weights = weights_of(teacher.network)
    quantized: dict[fx.Node, IntegerWeight] = {}
    grids: dict[fx.Node, ActivationGrid | None] = {}
    for node, layer in zip(weights, network.layers, strict=True):
        if layer.weight is not None:
            quantized[node], grids[node] = layer.weight, layer.input

    def rounded(node: fx.Node, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x, weight, *rest = inputs
        grid = grids[node]
        x = x if grid is None else grid.rounded(x)
        return (x, _rounded_weight(node, weight, quantized[node]), *rest)

    at_once = forward_images(teacher.network.graph, memory, inputs[0].device)
    images = len(inputs[0])
    count = min(images, _fitting_images(weights, len(quantized)))
    if count < min(_MIN_IMAGES, images):
        errors = _errors(teacher.network, set(quantized), rounded, split_inputs(inputs, at_once))
        return Sensitivity("error", errors)
    loss, sample = divergence(teacher), tuple(tensor[:count] for tensor in inputs)
    with torch.no_grad():
        expected = in_parts(teacher.network, sample, at_once)
        return Sensitivity(
            "divergence",
            {
                node.name: float(loss(in_parts(changed.run, sample, at_once), expected))
                for node in quantized
                for changed in [_OneLayerRounded(teacher.network, node, rounded)]
            },
        )


def _rounded_weight(node: fx.Node, weight: Tensor, like: IntegerWeight) -> Tensor:
    """Return a layer's weight on its best grid, with the bits and the format of the student's."""
    layout = queries.weight_layout(node)
    if like.form is not None:
        _, scale = best_weight_format(weight, [like.form], *layout)
        return fake_quantize_float(weight, scale, like.form.name)
    return fake_quantize(weight, *best_weight_grid(weight, like.bits, *layout), like.bits)


def sensitivity_passes(teacher: Captured, images: int) -> int:
    """Return how many images pass the teacher in `measure_sensitivity`, if it rounds all layers."""
    weights = weights_of(teacher.network)
    count = min(images, _fitting_images(weights, len(weights)))
    return images if count < min(_MIN_IMAGES, images) else count * len(weights)


def _fitting_images(weights: Mapping[fx.Node, Tensor], layers: int) -> int:
    """Return how many images may pass the network once for each layer."""
    operations = sum(layer_operations(node, weight) for node, weight in weights.items())
    return _MAX_OPERATIONS // max(1, layers * operations)


class _OneLayerRounded(fx.Interpreter):
    """Runs a network with one layer rounded."""

    def __init__(self, network: fx.GraphModule, layer: fx.Node, rounded: RoundInputs) -> None:
        super().__init__(network)
        self.layer, self.rounded = layer, rounded

    def run_node(self, n: fx.Node) -> Any:
        if n is not self.layer:
            return super().run_node(n)
        inputs, keywords = self.fetch_args_kwargs_from_env(n)
        return n.target(*self.rounded(n, inputs), **keywords)  # type: ignore[operator]


def _errors(
    network: fx.GraphModule,
    layers: set[fx.Node],
    rounded: RoundInputs,
    parts: Iterable[Sequence[Tensor]],
) -> dict[str, float]:
    """Σ (y − y_q)² / Σ y² of each layer's output y, with y_q the output for rounded inputs."""
    sums: dict[str, list[Tensor]] = {}
    for visit in (visit for inputs in parts for visit in Walk(network).visits(*inputs)):
        if visit.node in layers:
            function: Any = visit.node.target
            other = function(*rounded(visit.node, visit.inputs), **visit.node.kwargs)
            found = [x.double().square().sum() for x in (other - visit.value, visit.value)]
            so_far = sums.get(visit.node.name)
            sums[visit.node.name] = found if so_far is None else list(map(add, so_far, found))
    return {name: float(noise / power.clamp_min(1e-300)) for name, (noise, power) in sums.items()}
