"""Mixed precision without data: each layer's width from its sensitivity, under a size.

A stage between capture and student. It measures what each layer costs at each width, in accuracy
and in bytes, makes the best choice, and yields a `Scheme` that a user could have written: a base
width, and a `LayerBits` for each layer of another one.

The size is that of the ONNX file, which is what users deploy. It stores codes in 2, 4 or 8 bits,
so no other width would pay. Activations stay at 8 bits: their width takes no byte of the file, and
the kernels compute in 8 bits whatever it is.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from gdfq.analysis.knapsack import allocate, check_budget
from gdfq.deploy.onnx.sizes import WIDTHS, weight_sizes
from gdfq.deploy.onnx.writer import to_onnx
from gdfq.errors import UsageError
from gdfq.execution.progress import Listener, Step, silent
from gdfq.execution.seeding import stream
from gdfq.functional.grid import MAX_BITS, Bits, code_bounds, fake_quantize
from gdfq.functional.losses import distillation_loss, feature_loss
from gdfq.graph import queries
from gdfq.graph.batch_norms import fold_batch_norms
from gdfq.graph.capture import Captured
from gdfq.graph.outputs import in_order, output_names
from gdfq.graph.tensors import tensors_of
from gdfq.quantizers.lsq import best_weight_grid
from gdfq.sources.base import Batch
from gdfq.student.build import build_student
from gdfq.student.freeze import freeze
from gdfq.student.integer_network import IntegerNetwork
from gdfq.student.scheme import LayerBits, Scheme
from gdfq.tuning.calibrate import calibrate_

AUTO = "auto"
"""In the place of widths: they are to be chosen."""
BASE = Bits(4, 8)
"""Widths of the layers that the chosen scheme does not name."""
_IMAGES = 128
"""Images that sensitivities are measured on."""
_LENGTHS = 16
"""Bytes that lengths and numbered names in the file may take more when others than 4 bits are
chosen."""

Loss = Callable[[Any, Any], Tensor]
"""Outputs of student and teacher -> scalar."""
Layers = Mapping[str, Sequence[fx.Node]]
"""The layers whose width is to be chosen, by name; one that is called twice has two nodes."""


def parse_bits(bits: str | Bits, size: int | None) -> Bits:
    """The widths that are meant; of "auto" those that layers start from.

    Raises UsageError for text that says no widths, and for "auto" without a size or a size
    without "auto".
    """
    if (bits == AUTO) != (size is not None):
        raise UsageError(
            "bits 'auto' and a size belong together: widths are chosen to fit the size of the ONNX "
            f"file; got bits {str(bits)!r} and size {size}. Use as --bits auto --size 300KB."
        )
    if size is not None:
        if not isinstance(size, int) or size < 1:
            raise UsageError(f"size must be a whole number of bytes, at least 1; got {size!r}.")
        return BASE
    return bits if isinstance(bits, Bits) else Bits.parse(str(bits))


@dataclass(frozen=True)
class Sizes:
    """Bytes of the ONNX file, which no image changes."""

    rest: int
    """What the file holds whatever is chosen."""
    layers: Mapping[str, Mapping[int, int]]
    """Of each layer whose width is to be chosen, by name and width."""

    @property
    def groups(self) -> list[Mapping[int, int]]:
        """The layers', and the rest as one more thing to carry, without a choice."""
        return [*self.layers.values(), {0: self.rest}]

    def check(self, size: int) -> None:
        """Raise UsageError, which names the smallest possible size, when `size` is below it."""
        check_budget(self.groups, size)


@dataclass(frozen=True)
class Allocation:
    """The widths that were chosen, as a scheme and by the layers' names."""

    scheme: Scheme
    widths: Mapping[str, int]
    bytes: int
    """Of the ONNX file, at most."""


def choose_widths(
    teacher: Captured,
    scheme: Scheme,
    images: Tensor,
    size: int,
    sizes: Sizes,
    *,
    listener: Listener = silent,
) -> Allocation:
    """The scheme with widths for all layers that it does not keep, within `size` bytes of ONNX.

    images: normalised [N, *input_shape], N >= 1. sizes: those of `file_sizes` for this scheme.

    Raises UsageError when no choice is small enough.
    """
    teacher = fold_batch_norms(teacher)
    layers = free_layers(teacher, scheme)
    loss = divergence(teacher)
    costs = sensitivities(teacher, layers, images[:_IMAGES], loss=loss, listener=listener)
    *chosen, _ = allocate([*costs.values(), {0: 0.0}], sizes.groups, size)
    widths = dict(zip(layers, chosen, strict=True))
    named = tuple(
        LayerBits.exactly(name, bits)
        for name, bits in widths.items()
        if bits != scheme.bits.weights
    )
    total = sizes.rest + sum(sizes.layers[name][bits] for name, bits in widths.items())
    return Allocation(replace(scheme, layer_bits=(*scheme.layer_bits, *named)), widths, total)


def free_layers(teacher: Captured, scheme: Scheme) -> Layers:
    """The layers that the scheme does not keep. Raises UsageError when it keeps them all."""
    nodes = list(filter(queries.has_weight, teacher.network.graph.nodes))
    kept = scheme.overridden(nodes)
    layers: dict[str, list[fx.Node]] = {}
    for node in nodes:
        if node not in kept:
            layers.setdefault(queries.layer_name(node), []).append(node)
    if not layers:
        raise UsageError(
            "widths are chosen for layers that are not kept; "
            f"all {len(nodes)} of this network are. Keep fewer, or give their widths as bits."
        )
    return layers


def divergence(teacher: Captured) -> Loss:
    """How far a student's outputs are from the teacher's: KL(softmax(M) ‖ softmax(Q)) of logits
    [N, C], the mean over the images; `feature_loss` where outputs are not classes.
    """
    if teacher.classes is None:
        return lambda student, wanted: feature_loss(in_order(student), in_order(wanted))
    return partial(distillation_loss, temperature=1.0, reduction="batch")


@torch.no_grad()
def sensitivities(
    teacher: Captured,
    layers: Layers,
    images: Tensor,
    *,
    loss: Loss,
    listener: Listener = silent,
) -> dict[str, dict[int, float]]:
    """The loss of the network when one layer's weight alone is rounded to its best grid.

    teacher: with folded batch norms. Each width of `artifacts.onnx.WIDTHS` costs at least
    what a greater one does: where it would not, the difference is noise.
    """
    network = copy.deepcopy(teacher.network)
    tensors = tensors_of(network)
    wanted = network(images)
    costs: dict[str, dict[int, float]] = {}
    for index, (name, nodes) in enumerate(layers.items(), start=1):
        weights = {queries.weight_name(node): queries.weight_layout(node) for node in nodes}
        exact = {weight: tensors[weight].clone() for weight in weights}
        costs[name], worst = {}, 0.0
        for bits in sorted(WIDTHS, reverse=True):
            for weight, layout in weights.items():
                grid = best_weight_grid(exact[weight], bits, *layout)
                tensors[weight].copy_(fake_quantize(exact[weight], *grid, bits))
            worst = max(worst, float(loss(network(images), wanted)))
            costs[name][bits] = worst
        for weight, values in exact.items():
            tensors[weight].copy_(values)
        listener(Step("sensitivity", index, len(layers), {}))
    return costs


def file_sizes(teacher: Captured, scheme: Scheme, metadata: Mapping[str, str]) -> Sizes:
    """Bytes of the ONNX file: of each layer that the scheme does not keep, and of the rest.

    Measured on the file of the scheme as it is, which has to be of 4 bits. A layer of another
    width costs the words that say so, too. metadata: what the file will say about itself, apart
    from the widths that are chosen.

    Raises UsageError when there is nothing to choose.
    """
    teacher = fold_batch_norms(teacher)
    layers = free_layers(teacher, scheme)
    student = build_student(teacher, scheme)
    draw = stream(0, "allocation.noise")
    noise = torch.randn(2, *teacher.input_shape, generator=draw)
    batch = Batch((noise.to(teacher.device),), None, None)
    calibrate_(student, [batch], steps=1)  # a file's size knows no ranges
    network = freeze(student).cpu()
    _fill_(network)
    data = to_onnx(network, teacher.inputs, metadata, outputs=output_names(teacher))
    nodes = scheme.weight_bits(list(filter(queries.has_weight, teacher.network.graph.nodes)))
    taken = dict(zip(nodes, weight_sizes(network, data), strict=True))
    sizes = {
        name: {bits: sum(taken[node][bits] for node in layer) for bits in WIDTHS}
        for name, layer in layers.items()
    }
    fixed = len(data) - sum(layer[scheme.bits.weights] for layer in sizes.values())
    for name, layer in sizes.items():
        for bits in set(WIDTHS) - {scheme.bits.weights}:
            layer[bits] += len(f" {LayerBits.exactly(name, bits)}".encode())
    return Sizes(fixed + _LENGTHS, sizes)


def _fill_(network: IntegerNetwork) -> None:
    """Give a frozen network weights and biases of which a file can leave nothing out.

    Those of layers that share them, or that have none, are equal or zero until they are tuned.
    """
    draw = stream(0, "allocation.fill")
    for layer in network.layers:
        if layer.weight is not None:
            layer.weight.codes.random_(*code_bounds(layer.weight.bits), generator=draw)
            layer.weight.scale.uniform_(1, 2, generator=draw)
            layer.weight.zero_point.fill_(layer.weight.bits < MAX_BITS)
        if layer.bias is not None and layer.bias.is_floating_point():
            layer.bias.uniform_(1, 2, generator=draw)
        elif layer.bias is not None:
            layer.bias.random_(generator=draw)
