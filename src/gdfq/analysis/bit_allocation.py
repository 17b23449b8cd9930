"""Bit allocation without data: the bits of each layer, from its sensitivity, for a file size.

This stage comes between capture and student. It measures the sensitivity and the file size of each
layer at each number of bits, finds the best choice that fits, and returns it as a `Scheme` that a
user could have written: default bits, and `LayerBits` for each layer with other bits.

The size is that of the ONNX file, because that is the file that users deploy. It stores codes in 2,
4 or 8 bits, so other bit widths save nothing. Activations have 8 bits: their bits do not change the
size of the file, and kernels compute in 8 bits in any case.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from gdfq.analysis.knapsack import allocate, check_budget
from gdfq.deploy.onnx.sizes import WEIGHT_BITS, weight_sizes
from gdfq.deploy.onnx.writer import to_onnx
from gdfq.errors import UsageError
from gdfq.execution.budget import MemoryBudget
from gdfq.execution.progress import Listener, Step, silent
from gdfq.execution.seeding import stream
from gdfq.functional.grid import UNSATURATED_BITS, Bits, code_bounds, fake_quantize
from gdfq.functional.losses import distillation_loss, feature_loss
from gdfq.graph import queries
from gdfq.graph.batch_norms import fold_batch_norms
from gdfq.graph.capture import Captured
from gdfq.graph.ends import joined, output_names
from gdfq.graph.memory import forward_images
from gdfq.graph.outputs import in_order, in_parts
from gdfq.graph.tensors import tensors_of
from gdfq.quantizers.lsq import best_weight_grid
from gdfq.sources.base import Batch
from gdfq.student.build import build_student
from gdfq.student.freeze import freeze
from gdfq.student.integer_network import IntegerNetwork
from gdfq.student.scheme import LayerBits, Scheme
from gdfq.tuning.calibrate import calibrate_

AUTO = "auto"
"""The value of `bits` that asks for bit allocation."""
DEFAULT_BITS = Bits(4, 8)
"""Bits of the layers that the chosen scheme does not name."""
ALLOCATION_IMAGES = 128
"""Images that sensitivities are measured on."""
_EXTRA_BYTES = 16
"""Bytes by which length fields and numbered names in the file may grow when bits other than 4 are
chosen."""

Loss = Callable[[Any, Any], Tensor]
"""Outputs of student and teacher -> scalar."""
Layers = Mapping[str, Sequence[fx.Node]]
"""The layers whose bits are chosen, by name; a layer that is called twice has two nodes."""


def parse_bits(bits: str | Bits, size: int | None) -> Bits:
    """Parse bits such as "w4a8"; "auto" gives the bits that bit allocation starts from.

    Args:
        bits: Bits, their text, or "auto".
        size: Largest size of the ONNX file in bytes; given with "auto" only.

    Raises:
        UsageError: The text is not a bit width, "auto" comes without a size, or a size comes
            without "auto".
    """
    if (bits == AUTO) != (size is not None):
        found = "no --size was given" if size is None else f"got bits {str(bits)!r} and size {size}"
        raise UsageError(
            "bits 'auto' and a size belong together: bits are chosen so that the ONNX file fits "
            f"the size; {found}. Give both: --bits auto --size 300KB."
        )
    if size is not None:
        return DEFAULT_BITS
    return bits if isinstance(bits, Bits) else Bits.parse(str(bits))


@dataclass(frozen=True)
class Sizes:
    """Bytes of the ONNX file, which do not depend on the images.

    Attributes:
        rest: Bytes that do not depend on the choice.
        layers: Bytes of each layer whose bits are chosen, by name and bits.
    """

    rest: int
    layers: Mapping[str, Mapping[int, int]]

    @property
    def groups(self) -> list[Mapping[int, int]]:
        """The groups of the knapsack: the layers, and the rest as a group with a single option."""
        return [*self.layers.values(), {0: self.rest}]

    def check(self, size: int) -> None:
        """Check that a choice fits in `size` bytes.

        Raises:
            UsageError: `size` is too small; the message gives the smallest possible size.
        """
        check_budget(self.groups, size)


@dataclass(frozen=True)
class Allocation:
    """The chosen bits.

    Attributes:
        scheme: The scheme with the chosen bits.
        bits: The chosen bits by layer name.
        bytes: Upper bound of the size of the ONNX file.
    """

    scheme: Scheme
    bits: Mapping[str, int]
    bytes: int


def choose_bits(
    teacher: Captured,
    scheme: Scheme,
    images: Tensor,
    size: int,
    sizes: Sizes,
    *,
    listener: Listener = silent,
    memory: MemoryBudget = MemoryBudget(),
) -> Allocation:
    """Choose the bits of all layers that have no layer bits, so that the ONNX file fits.

    Args:
        teacher: The teacher.
        scheme: The scheme before the choice.
        images: Normalised images [N, *input_shape], N >= 1, all of which are used.
        size: Largest size of the ONNX file in bytes.
        sizes: The result of `onnx_sizes` for this scheme.
        listener: Receives progress.
        memory: Budget for the images that pass together.

    Raises:
        UsageError: No choice fits in `size` bytes.
    """
    teacher = fold_batch_norms(teacher)
    layers = free_layers(teacher, scheme)
    loss = divergence(teacher)
    costs = sensitivities(teacher, layers, images, loss=loss, listener=listener, memory=memory)
    *chosen, _ = allocate([*costs.values(), {0: 0.0}], sizes.groups, size)
    chosen_bits = dict(zip(layers, chosen, strict=True))
    named = tuple(
        LayerBits.exactly(name, bits)
        for name, bits in chosen_bits.items()
        if bits != scheme.bits.weights
    )
    total = sizes.rest + sum(sizes.layers[name][bits] for name, bits in chosen_bits.items())
    return Allocation(replace(scheme, layer_bits=(*scheme.layer_bits, *named)), chosen_bits, total)


def free_layers(teacher: Captured, scheme: Scheme) -> Layers:
    """The layers that the scheme gives no layer bits.

    Raises:
        UsageError: The scheme gives layer bits to all layers.
    """
    nodes = list(filter(queries.has_weight, teacher.network.graph.nodes))
    overridden = scheme.overridden(nodes)
    layers: dict[str, list[fx.Node]] = {}
    for node in nodes:
        if node not in overridden:
            layers.setdefault(queries.layer_name(node), []).append(node)
    if not layers:
        raise UsageError(
            "bits are chosen for layers without --layer-bits; "
            f"all {len(nodes)} of this network are given some. Give them to fewer layers, or "
            "replace 'auto' by bits."
        )
    return layers


def divergence(teacher: Captured) -> Loss:
    """The distance of a student's outputs from the teacher's.

    KL(softmax(M) ‖ softmax(Q)) of the teacher's logits M and the student's Q [N, C], averaged over
    the images; `feature_loss` where outputs are not classes.
    """
    if teacher.classes is None:
        return lambda student, expected: feature_loss(in_order(student), in_order(expected))
    return partial(distillation_loss, temperature=1.0, reduction="batch")


@torch.no_grad()
def sensitivities(
    teacher: Captured,
    layers: Layers,
    images: Tensor,
    *,
    loss: Loss,
    listener: Listener = silent,
    memory: MemoryBudget = MemoryBudget(),
) -> dict[str, dict[int, float]]:
    """The loss of the network when the weight of one layer alone is rounded to its best grid.

    Args:
        teacher: The teacher with folded batch norms.
        layers: The layers to round, one at a time.
        images: Normalised images [N, *input_shape].
        loss: Compares the outputs.
        listener: Receives progress.
        memory: Budget for the images that pass together.

    Returns:
        The loss by layer name and bits (`sizes.WEIGHT_BITS`). With fewer bits it is
        never smaller: a decrease is noise and is raised to the loss of more bits.
    """
    network = copy.deepcopy(teacher.network)
    tensors = tensors_of(network)
    at_once = forward_images(network.graph, memory, images.device)
    expected = in_parts(network, [images], at_once)
    costs: dict[str, dict[int, float]] = {}
    for index, (name, nodes) in enumerate(layers.items(), start=1):
        weights = {queries.weight_name(node): queries.weight_layout(node) for node in nodes}
        originals = {weight: tensors[weight].clone() for weight in weights}
        costs[name], worst = {}, 0.0
        for bits in sorted(WEIGHT_BITS, reverse=True):
            for weight, layout in weights.items():
                grid = best_weight_grid(originals[weight], bits, *layout)
                tensors[weight].copy_(fake_quantize(originals[weight], *grid, bits))
            worst = max(worst, float(loss(in_parts(network, [images], at_once), expected)))
            costs[name][bits] = worst
        for weight, values in originals.items():
            tensors[weight].copy_(values)
        listener(Step("sensitivity", index, len(layers), {}))
    return costs


def onnx_sizes(teacher: Captured, scheme: Scheme, metadata: Mapping[str, str]) -> Sizes:
    """Bytes of the ONNX file: of each layer without layer bits, and of the rest.

    They are measured on the file of the given scheme, whose weights must have 4 bits. A layer with
    other bits also adds its entry in the metadata.

    Args:
        teacher: The teacher.
        scheme: The scheme before the choice.
        metadata: The metadata of the file, without the chosen bits.

    Raises:
        UsageError: No layer is left to choose bits for.
    """
    teacher = fold_batch_norms(teacher)
    layers = free_layers(teacher, scheme)
    student = build_student(teacher, scheme)
    draw = stream(0, "allocation.noise")
    noise = torch.randn(2, *teacher.input_shape, generator=draw)
    batch = Batch((noise.to(teacher.device),), None, None)
    calibrate_(student, [batch], steps=1)  # the size does not depend on ranges
    network = freeze(student).cpu()
    _fill_(network)
    network = IntegerNetwork(joined(network.module, teacher.ends))
    names = output_names(teacher, teacher.ends)
    data = to_onnx(network, teacher.inputs, metadata, outputs=names)
    nodes = scheme.weight_bits(list(filter(queries.has_weight, teacher.network.graph.nodes)))
    bytes_by_node = dict(zip(nodes, weight_sizes(network, data), strict=True))
    sizes = {
        name: {bits: sum(bytes_by_node[node][bits] for node in layer) for bits in WEIGHT_BITS}
        for name, layer in layers.items()
    }
    fixed = len(data) - sum(layer[scheme.bits.weights] for layer in sizes.values())
    for name, layer in sizes.items():
        for bits in set(WEIGHT_BITS) - {scheme.bits.weights}:
            layer[bits] += len(f" {LayerBits.exactly(name, bits)}".encode())
    return Sizes(fixed + _EXTRA_BYTES, sizes)


def _fill_(network: IntegerNetwork) -> None:
    """Fill an integer network with random weights and biases, so that a file stores all of them.

    Before tuning, shared weights are equal and missing biases are zero, and a file would store
    them once or not at all.
    """
    draw = stream(0, "allocation.fill")
    for layer in network.layers:
        if layer.weight is not None:
            layer.weight.codes.random_(*code_bounds(layer.weight.bits), generator=draw)
            layer.weight.scale.uniform_(1, 2, generator=draw)
            layer.weight.zero_point.fill_(layer.weight.bits < UNSATURATED_BITS)
        if layer.bias is not None and layer.bias.is_floating_point():
            layer.bias.uniform_(1, 2, generator=draw)
        elif layer.bias is not None:
            layer.bias.random_(generator=draw)
