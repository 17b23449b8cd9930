"""How an ONNX file stores the codes of activations: in 8 bits, whatever their own."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gdfq.deploy.onnx.form import PACKED_WEIGHTS, Form
from gdfq.deploy.saturation import may_overflow
from gdfq.functional import integer
from gdfq.functional.grid import MAX_BITS, code_bounds
from gdfq.student.integer_network import ActivationGrid, IntegerNetwork, activation_grid

_HIGHEST = 2**MAX_BITS - 1
"""The highest code of uint8."""
_TIE_DISTANCE = 2.0**-14
"""Distance from n + 1/2, in steps of a grid, from which kernels that add integers round as the
student does, if the ratio r of the scales is at most 1. They multiply code and zero point by r and
add the new zero point (all up to 255) before they round: each of their two products and two sums is
2^-17 off at most, and the ratio and the student's own steps less."""


@dataclass(frozen=True)
class StoredCodes:
    """The codes of an activation in a file."""

    name: str
    """Name of the value in the graph."""
    lowest: int
    """What is stored for the lowest code."""
    needs_clip: bool
    """Whether QuantizeLinear may return codes that k bits do not have, which a Clip removes."""
    adds_zero: bool = False
    """Whether 0 is added before QuantizeLinear: ONNX Runtime fuses a sum to one integer kernel, but
    has none that rounds the values of a grid to the next grid."""


@dataclass(frozen=True)
class StoredTokens:
    """The codes of an activation with a scale for each token in a file, as floats."""

    name: str
    """Name of the value in the graph."""


def stored_tokens(network: IntegerNetwork) -> dict[str, StoredTokens]:
    """Return how a file stores the codes of activations with a scale for each token, by name."""
    return {found.name: StoredTokens(f"{found.name}.q") for found in network.tokens}


def stored_codes(network: IntegerNetwork, form: Form = PACKED_WEIGHTS) -> dict[str, StoredCodes]:
    """Return how a file stores the codes of each activation, by the name of its integer grid.

    Codes of k < 8 bits are stored as 0 to 2^k − 1, and a Clip follows QuantizeLinear. Values that
    were on a grid before are bounded. Where the bounds lie within the codes, no Clip is needed.
    Where they exceed the highest alone, as after a ReLU, codes are stored as 256 − 2^k to 255:
    then QuantizeLinear itself saturates at the highest.

    Forms of pairs alone have 8 bits, signed ones from −128 on.
    """
    if form.only_pairs:
        lowest = code_bounds(MAX_BITS)[0] if form.signed else 0
        codes = [StoredCodes(f"{grid.name}.q", lowest, False) for grid in network.activations]
        return {grid.name: c for grid, c in zip(network.activations, codes, strict=True)}
    tensors = network.tensors
    overflowing = {
        layer.input.name
        for layer in network.layers
        if layer.input is not None and may_overflow(layer, _HIGHEST)
    }
    return {
        grid.name: _stored(grid, tensors, may_shift=grid.name not in overflowing)
        for grid in network.activations
        if grid.form is None
    }


def _stored(grid: ActivationGrid, tensors: Mapping[str, Tensor], may_shift: bool) -> StoredCodes:
    source = activation_grid(grid.node.all_input_nodes[0], tensors)
    needs_clip = grid.bits < MAX_BITS
    of_any_values = StoredCodes(f"{grid.name}.{'clip' if needs_clip else 'q'}", 0, needs_clip)
    if source is None or source.form is not None:
        return of_any_values
    lowest, highest = integer.offset_bounds(grid.zero_point, grid.bits)
    steps = _steps(grid, source)
    inside = steps[(steps > lowest - 1) & (steps < highest + 1)]
    if has_ties(inside, float(source.scale / grid.scale)):
        return of_any_values
    spare = _HIGHEST - (2**grid.bits - 1)
    is_below, is_above = bool(steps.min() < lowest - 0.5), bool(steps.max() > highest + 0.5)
    if spare and (is_below or (is_above and not may_shift)):
        return StoredCodes(f"{grid.name}.clip", 0, needs_clip=True, adds_zero=True)
    return StoredCodes(f"{grid.name}.q", spare if is_above else 0, needs_clip=False, adds_zero=True)


def _steps(grid: ActivationGrid, source: ActivationGrid) -> Tensor:
    """Return all values of a grid in units of the next grid's scale."""
    lowest, highest = code_bounds(source.bits)
    codes = torch.arange(lowest, highest + 1, device=source.scale.device)
    values = integer.values(codes - source.zero_point, source.scale)
    return integer.steps_of(values, grid.scale)


def has_ties(steps: Tensor, ratio: float) -> bool:
    """Return whether numbers are so near n + 1/2 that kernels may round them otherwise.

    Args:
        steps: Values of a grid in units of the next grid's scale.
        ratio: The first scale, in the same units. Above 1 the kernel adds numbers beyond 255, whose
            rounding grows alike.
    """
    distance = _TIE_DISTANCE * (2 * ratio if ratio > 1 else 1)
    return bool(((steps - steps.floor() - 0.5).abs() < distance).any())
