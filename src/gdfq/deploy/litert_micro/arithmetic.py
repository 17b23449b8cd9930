"""What the kernels of TFLite Micro compute on codes; the writer and the simulation share it.

A code q is held as u = q − z. Each operator adds whole numbers in int32, and requantizes
(`gdfq.functional.gemmlowp`). Weights are stored times a power of two, the headroom, that int8
holds: the first of the two roundings is to a whole number, which is finer where sums are larger.
"""

import math

import numpy as np
from torch import Tensor, fx

from gdfq.deploy.litert.windows import Windows, average_windows, pooling_windows
from gdfq.graph import operators, queries
from gdfq.graph.operators import name_of
from gdfq.student.integer_network import IntegerLayer

Shape = tuple[int, ...]
_MAX_WEIGHT, _MAX_BIAS = 127, 2**30
ONE = 64
"""What is stored for 1 in the weight of a mean."""


def headroom(layer: IntegerLayer) -> int:
    """Return the power of two by which a layer's weight and bias are stored larger."""
    assert layer.weight is not None
    largest = float((layer.weight.codes - layer.weight.zero_point).abs().max())
    bias = 0.0 if layer.bias is None else float(layer.bias.double().abs().max())
    factor = 1
    while factor < ONE and 2 * factor * largest <= _MAX_WEIGHT and 2 * factor * bias <= _MAX_BIAS:
        factor *= 2
    return factor


def layer_factors(layer: IntegerLayer, output_scale: Tensor) -> list[float]:
    """Return M of each output channel, as the kernels compute it from the scales of a file."""
    assert layer.weight is not None
    assert layer.input is not None
    stored = layer.weight.scale.flatten() / headroom(layer)
    scale, result = float(layer.input.scale), float(output_scale)
    channels = layer.weight.codes.shape[0]
    if name_of(layer.node) in operators.LINEARS and channels == 1:
        # A linear layer with one scale multiplies the scales in float32.
        return [float(np.float32(scale) * np.float32(stored.item())) / result]
    return [scale * own / result for own in stored.tolist()]


def windows_of_average(node: fx.Node, shape: Shape) -> tuple[Windows, float] | None:
    """Return the windows of an average, and the number that their sums are divided by.

    Args:
        node: A node.
        shape: Shape of its input.

    Returns:
        None if the node is no average over positions, or divides sums by several numbers.
    """
    if len(shape) not in {3, 4}:
        return None
    sides = shape[2:]
    if _is_mean_over_positions(node, len(shape)):
        return pooling_windows(sides, sides), float(math.prod(sides))
    pool = queries.average_pooling_of(node)
    if pool is None:
        return None
    windows, count = average_windows(pool, sides)
    return None if count is None else (windows, count)


def _is_mean_over_positions(node: fx.Node, rank: int) -> bool:
    found = queries.mean_of(node)
    return found is not None and sorted(dim % rank for dim in found[0]) == list(range(2, rank))


def mean_scale(count: float) -> float:
    """Return the scale of the weight of a mean over `count` values, in float32."""
    return float(np.float32(1 / (ONE * count)))
