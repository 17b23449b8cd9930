"""What quantization does to each layer: error, clipping, ranges, and the harm to the outputs."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gdfq.analysis.sensitivity import measure_harm
from gdfq.functional.grid import code_bounds, dequantize
from gdfq.graph import operators, queries
from gdfq.graph.batch_norms import fold_batch_norms
from gdfq.graph.capture import Captured
from gdfq.graph.queries import images_at_once, weights_of
from gdfq.graph.walk import Visit, Walk
from gdfq.student.integer_network import ActivationGrid, IntegerLayer, IntegerNetwork

BINS = 40
_HIGHEST = 120.0
"""Decibels; more is rounding of float32."""
_IMAGES = 32


@dataclass(frozen=True)
class LayerEvidence:
    """One convolution or linear layer of the student."""

    name: str
    operator: str
    bits: int | None
    """Of its weight; None for a layer that is float."""
    weights: int
    share: float
    """Of the bytes of all weights, in percent."""
    weight_sqnr: float | None
    """Decibels: the original weight (batch norm folded, channels
    equalized) over its difference from the student's,
    which is rounding and tuning."""
    output_sqnr: float
    """Decibels: the teacher's output over the student's difference from it, with all that the
    layers before have added."""
    harm: float | None
    """What rounding this layer alone does (`gdfq.analysis.sensitivity`); None if it is float."""
    activation: str | None
    """The quantized activation that enters it."""


@dataclass(frozen=True)
class ActivationEvidence:
    """One quantized activation of the student."""

    name: str
    bits: int
    low: float
    high: float
    """The ends of its grid."""
    least: float
    greatest: float
    """The values that were seen."""
    saturation: float
    """Share of the values that are clipped, in percent."""
    sqnr: float
    """Decibels: the values over the difference that rounding them makes."""


@dataclass(frozen=True, eq=False)
class Layers:
    """All layers and activations, with counts of their values: [layers or activations, BINS]."""

    layers: tuple[LayerEvidence, ...]
    activations: tuple[ActivationEvidence, ...]
    harm: str
    """The kind of number that `harm` is: see `gdfq.analysis.sensitivity.Harm`."""
    images: int
    weight_counts: np.ndarray[Any, Any]
    weight_ends: np.ndarray[Any, Any]
    """Least and greatest value of each histogram, [layers, 2]."""
    activation_counts: np.ndarray[Any, Any]
    activation_ends: np.ndarray[Any, Any]


def sqnr(signal: Tensor, other: Tensor) -> float:
    """10 log₁₀ (Σ x² / Σ (x − y)²) in decibels, within ±120; of two tensors of one shape."""
    power = float(signal.double().square().sum())
    noise = float((signal.double() - other.double()).square().sum())
    if noise == 0:
        return _HIGHEST
    return max(-_HIGHEST, min(_HIGHEST, 10 * math.log10(max(power, 1e-300) / noise)))


def saturation(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> float:
    """Share of x, in percent, whose code lies beyond those that `bits` bits have."""
    low, high = code_bounds(bits)
    codes = (x / scale).round() + zero_point
    return 100 * float(((codes < low) | (codes > high)).double().mean())


def measure_layers(teacher: Captured, network: IntegerNetwork, *inputs: Tensor) -> Layers:
    """Compare a frozen student layer by layer with its teacher.

    inputs: [N, *shape] for each input, of which as many are used as their activations allow.
    Both networks run side by side, and only what the next nodes need is held.
    """
    teacher = fold_batch_norms(teacher)
    count = min(_IMAGES, images_at_once(teacher.network))
    few = tuple(tensor[:count].to(teacher.device) for tensor in inputs)
    wanted = weights_of(teacher.network)
    layers_of_student = {layer.node: layer for layer in network.layers}
    pairs = dict(zip(layers_of_student, wanted, strict=True))
    total = sum(map(_stored_bits, layers_of_student.values(), wanted.values()))
    grids = {grid.node: grid for grid in network.activations}
    harm = measure_harm(teacher, network, *few)

    layers, activations, spreads, ranges = [], [], [], []
    outputs = (v.value for v in Walk(teacher.network).visits(*few) if v.node in wanted)
    for visit in Walk(network.module).visits(*few):
        if visit.node in grids:
            activations.append(_activation(visit, grids[visit.node]))
            ranges.append(_histogram(visit.inputs[0]))
        elif visit.node in pairs:
            node, layer = pairs[visit.node], layers_of_student[visit.node]
            weight, bits = wanted[node], layer.bits
            layers.append(
                LayerEvidence(
                    name=queries.layer_name(node),
                    operator=operators.name_of(node).split(".")[1],
                    bits=bits,
                    weights=weight.numel(),
                    share=100 * _stored_bits(layer, weight) / total,
                    weight_sqnr=None if bits is None else sqnr(weight, visit.inputs[1]),
                    output_sqnr=sqnr(next(outputs), visit.value),
                    harm=harm.of.get(node.name),
                    activation=None if layer.input is None else _shown_name(layer.input),
                )
            )
            spreads.append(_histogram(weight))
    weight_counts, weight_ends = _stacked(spreads)
    activation_counts, activation_ends = _stacked(ranges)
    return Layers(
        tuple(layers),
        tuple(activations),
        harm.kind,
        len(few[0]),
        weight_counts,
        weight_ends,
        activation_counts,
        activation_ends,
    )


def _stored_bits(layer: IntegerLayer, weight: Tensor) -> int:
    return weight.numel() * (layer.bits or 32)


def _shown_name(grid: ActivationGrid) -> str:
    return grid.name.rstrip("_")


def _activation(visit: Visit, grid: ActivationGrid) -> ActivationEvidence:
    x, scale, zero_point, bits = visit.inputs
    ends = dequantize(torch.tensor(code_bounds(bits)).to(scale), scale, zero_point, bits)
    return ActivationEvidence(
        name=_shown_name(grid),
        bits=bits,
        low=float(ends[0]),
        high=float(ends[1]),
        least=float(x.min()),
        greatest=float(x.max()),
        saturation=saturation(x, scale, zero_point, bits),
        sqnr=sqnr(x, visit.value),
    )


def _histogram(x: Tensor) -> tuple[Tensor, tuple[float, float]]:
    """Counts [BINS] between the least and the greatest value, and these."""
    ends = float(x.min()), float(x.max())
    return torch.histc(x.detach().float().cpu(), BINS, *ends), ends


def _stacked(
    found: list[tuple[Tensor, tuple[float, float]]],
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    counts = np.array([counts.numpy() for counts, _ in found], np.float32).reshape(-1, BINS)
    return counts, np.array([ends for _, ends in found], np.float32).reshape(-1, 2)
