"""The effect of quantization on each layer: error, clipping, ranges and sensitivity."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gdfq.analysis.sensitivity import measure_sensitivity, sensitivity_passes
from gdfq.analysis.work import Work
from gdfq.execution.budget import MemoryBudget
from gdfq.functional.float_grid import NumberFormat
from gdfq.functional.grid import code_bounds
from gdfq.graph import operators, queries
from gdfq.graph.batch_norms import fold_batch_norms
from gdfq.graph.capture import Captured
from gdfq.graph.memory import compared_images
from gdfq.graph.queries import weights_of
from gdfq.graph.walk import Visit, Walk
from gdfq.student.integer_network import ActivationGrid, IntegerLayer, IntegerNetwork

BINS = 40
"""Bins of a histogram of values."""
_MAX_DECIBELS = 120.0
"""Larger ratios are rounding errors of float32."""
_MAX_IMAGES = 32


@dataclass(frozen=True)
class LayerEvidence:
    """One convolution or linear layer of the student.

    Attributes:
        name: Its name.
        operator: Its operator, such as "conv2d".
        bits: Bits of its weight; None for a float layer.
        weights: Number of its weights.
        share: Share of the bytes of all weights, in percent.
        weight_sqnr: SQNR of the student's weight in decibels, relative to the teacher's weight
            with folded batch norm and equalized channels; it includes the changes by tuning. None
            for a float layer.
        output_sqnr: SQNR of the student's output in decibels, relative to the teacher's output; it
            includes the errors of all layers before.
        sensitivity: The error when this layer alone is rounded (`gdfq.analysis.sensitivity`); None
            for a float layer.
        activation: Name of the quantized activation that is its input; None for a float input.
        format: Format of its weight's floating-point grid, such as "E4M3"; None for others.
        token_bits: Bits of its input, where each token has a scale of its own; None elsewhere.
    """

    name: str
    operator: str
    bits: int | None
    weights: int
    share: float
    weight_sqnr: float | None
    output_sqnr: float
    sensitivity: float | None
    activation: str | None
    format: str | None = None
    token_bits: int | None = None


@dataclass(frozen=True)
class ActivationEvidence:
    """One quantized activation of the student.

    Attributes:
        name: Its name.
        bits: Its bits.
        low: Lower end of its grid.
        high: Upper end of its grid.
        minimum: Smallest observed value.
        maximum: Largest observed value.
        saturation: Share of the values that are clipped, in percent.
        sqnr: SQNR of rounding its values, in decibels.
        format: Format of its floating-point grid; None for an integer grid.
    """

    name: str
    bits: int
    low: float
    high: float
    minimum: float
    maximum: float
    saturation: float
    sqnr: float
    format: str | None = None


@dataclass(frozen=True, eq=False)
class Layers:
    """All layers and activations, with histograms of their values.

    Attributes:
        layers: The layers, in the order of the graph.
        activations: The quantized activations, in the order of the graph.
        sensitivity: The kind of the layers' sensitivity
            (`gdfq.analysis.sensitivity.Sensitivity.kind`).
        images: Number of images that were measured.
        weight_counts: Histograms of the weights [layers, BINS].
        weight_ends: Smallest and largest value of each histogram [layers, 2].
        activation_counts: Histograms of the activations [activations, BINS].
        activation_ends: Smallest and largest value of each histogram [activations, 2].
    """

    layers: tuple[LayerEvidence, ...]
    activations: tuple[ActivationEvidence, ...]
    sensitivity: str
    images: int
    weight_counts: np.ndarray[Any, Any]
    weight_ends: np.ndarray[Any, Any]
    activation_counts: np.ndarray[Any, Any]
    activation_ends: np.ndarray[Any, Any]


def sqnr(signal: Tensor, other: Tensor) -> float:
    """SQNR 10 log₁₀ (Σ x² / Σ (x − y)²) in decibels of tensors of equal shape, clipped to ±120."""
    power = noise = 0.0
    for x, y in _parts(signal, other):
        power += float(x.double().square().sum())
        noise += float((x.double() - y.double()).square().sum())
    if noise == 0:
        return _MAX_DECIBELS
    return max(-_MAX_DECIBELS, min(_MAX_DECIBELS, 10 * math.log10(max(power, 1e-300) / noise)))


def saturation(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> float:
    """Share of the values of x, in percent, whose code is outside the range of `bits` bits.

    Args:
        x: Any shape, unrounded.
        scale: Scale of the grid, a scalar.
        zero_point: Zero point of the grid, a scalar.
        bits: Bits of a code.
    """
    low, high = code_bounds(bits)
    clipped = 0
    for (part,) in _parts(x):
        codes = (part / scale).round() + zero_point
        clipped += int(((codes < low) | (codes > high)).sum())
    return 100 * clipped / x.numel()


def share_beyond(x: Tensor, low: float, high: float) -> float:
    """Share of the values of x, in percent, that are below or above the ends of a range."""
    return 100 * sum(int(((p < low) | (p > high)).sum()) for (p,) in _parts(x)) / x.numel()


def _parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield parts of tensors of equal shape: what is computed of them is small beside them."""
    shaped = [torch.atleast_1d(tensor) for tensor in tensors]
    rows = max(1, _PART_ELEMENTS * len(shaped[0]) // max(1, shaped[0].numel()))
    return zip(*(tensor.split(rows) for tensor in shaped), strict=True)


_PART_ELEMENTS = 2**20
"""Elements of a tensor that are computed with in float64 at once: 8 MiB."""


def measure_layers(
    teacher: Captured,
    network: IntegerNetwork,
    *inputs: Tensor,
    memory: MemoryBudget = MemoryBudget(),
) -> Layers:
    """Compare an integer network with its teacher, layer by layer.

    Both networks run node by node at the same time, and only values that later nodes need are kept
    in memory.

    Args:
        teacher: The teacher, with the student's channel scales.
        network: The integer network.
        inputs: A tensor [N, *shape] for each input; at most 32 rows are used.
        memory: Budget for the activations; only as many rows are used as fit.
    """
    teacher = fold_batch_norms(teacher)
    count = _images(teacher, memory)
    sample = tuple(tensor[:count].to(teacher.device) for tensor in inputs)
    teacher_weights = weights_of(teacher.network)
    layers_of_student = {layer.node: layer for layer in network.layers}
    pairs = dict(zip(layers_of_student, teacher_weights, strict=True))
    total = sum(map(_stored_bits, layers_of_student.values(), teacher_weights.values()))
    grids = {grid.node: grid for grid in network.activations}
    sensitivity = measure_sensitivity(teacher, network, *sample, memory=memory)

    layers, activations, spreads, ranges = [], [], [], []
    outputs = (v.value for v in Walk(teacher.network).visits(*sample) if v.node in teacher_weights)
    for visit in Walk(network.module).visits(*sample):
        if visit.node in grids:
            activations.append(_activation(visit, grids[visit.node]))
            ranges.append(_histogram(visit.inputs[0]))
        elif visit.node in pairs:
            node, layer = pairs[visit.node], layers_of_student[visit.node]
            weight, bits = teacher_weights[node], layer.bits
            layers.append(
                LayerEvidence(
                    name=queries.layer_name(node),
                    operator=operators.name_of(node).split(".")[1],
                    bits=bits,
                    weights=weight.numel(),
                    share=100 * _stored_bits(layer, weight) / total,
                    weight_sqnr=None if bits is None else sqnr(weight, visit.inputs[1]),
                    output_sqnr=sqnr(next(outputs), visit.value),
                    sensitivity=sensitivity.by_layer.get(node.name),
                    activation=None if layer.input is None else _shown_name(layer.input),
                    format=None if layer.weight is None else _shown_format(layer.weight.form),
                    token_bits=layer.token_bits,
                )
            )
            spreads.append(_histogram(weight))
    weight_counts, weight_ends = _stacked(spreads)
    activation_counts, activation_ends = _stacked(ranges)
    return Layers(
        tuple(layers),
        tuple(activations),
        sensitivity.kind,
        len(sample[0]),
        weight_counts,
        weight_ends,
        activation_counts,
        activation_ends,
    )


_PASSES_PER_IMAGE = 13
"""Forward passes of both networks that take as long as walking through them, with the ratios of
signal and error in float64. Measured on three networks: 10 to 17."""


def layers_work(teacher: Captured, memory: MemoryBudget = MemoryBudget()) -> Work:
    """Return how much work `measure_layers` is with a memory budget."""
    count = _images(teacher, memory)
    walked = _PASSES_PER_IMAGE * count
    return Work(walked + sensitivity_passes(teacher, count), walked)


def _images(teacher: Captured, memory: MemoryBudget) -> int:
    """Return how many images are measured."""
    return min(_MAX_IMAGES, compared_images(teacher.network.graph, memory, teacher.device))


def _stored_bits(layer: IntegerLayer, weight: Tensor) -> int:
    return weight.numel() * (layer.bits or 32)


def _shown_name(grid: ActivationGrid) -> str:
    return grid.name.rstrip("_")


def _activation(visit: Visit, grid: ActivationGrid) -> ActivationEvidence:
    x = visit.inputs[0]
    low, high = grid.ends
    return ActivationEvidence(
        name=_shown_name(grid),
        bits=grid.bits,
        low=low,
        high=high,
        minimum=float(x.min()),
        maximum=float(x.max()),
        saturation=share_beyond(x, low, high)
        if grid.form is not None
        else saturation(x, grid.scale, grid.zero_point, grid.bits),
        sqnr=sqnr(x, visit.value),
        format=_shown_format(grid.form),
    )


def _shown_format(form: NumberFormat | None) -> str | None:
    return None if form is None else form.name


def _histogram(x: Tensor) -> tuple[Tensor, tuple[float, float]]:
    """Counts [BINS] between the smallest and the largest value, and these two values."""
    ends = float(x.min()), float(x.max())
    return torch.histc(x.detach().float().cpu(), BINS, *ends), ends


def _stacked(
    found: list[tuple[Tensor, tuple[float, float]]],
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    counts = np.array([counts.numpy() for counts, _ in found], np.float32).reshape(-1, BINS)
    return counts, np.array([ends for _, ends in found], np.float32).reshape(-1, 2)
