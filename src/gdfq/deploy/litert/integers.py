"""Operators of a `.tflite` file that make codes of codes, as XNNPACK rounds them.

Where XNNPACK has no such operator, or one that rounds otherwise, the functions return None and the
numbers are computed in floats: its integer mean is up to 10⁻⁵ of the result off, and its int8 to
int8 `QUANTIZE` multiplies by a number of 8 fractional bits.
"""

import math

import numpy as np

from gdfq.deploy.litert.carriers import StoredCodes
from gdfq.deploy.litert.emitter import Emitter, Value
from gdfq.deploy.litert.flatbuffer import Grid
from gdfq.deploy.litert.moves import as_map, from_map, padded_for
from gdfq.deploy.litert.windows import average_windows, depthwise_options
from gdfq.graph.queries import AveragePooling

Shape = tuple[int, ...]
ARITHMETIC = frozenset({"add", "sub", "mul"})
"""Short names of the operators that `arithmetic` writes."""
_SUM_RATIOS = (2.0**-10, 2.0**8)
"""Ratios of the scales of a term and of the sum that XNNPACK's integer addition takes."""
_PRODUCT_RATIOS = (2.0**-16, 2.0**8)
"""Ratios of scales that XNNPACK's integer multiplication takes."""
_MAX_LAYER_RATIO = 2.0**8
"""Limit of the ratio of scales, products to output, that XNNPACK's integer layers take."""
_MAX_WINDOW = 25
"""Entries of a window that XNNPACK's depthwise convolution adds at once. Means of larger windows
are faster in floats."""


def fits_layer(products: float, carrier: StoredCodes) -> bool:
    """Return whether XNNPACK has an integer layer for the largest scale of its products."""
    return products / carrier.scale < _MAX_LAYER_RATIO


def arithmetic(
    emit: Emitter, kind: str, x: Value, y: Value, shape: Shape, carrier: StoredCodes
) -> Value | None:
    """Write a sum, difference or product of two tensors of codes."""
    assert x.grid is not None
    assert y.grid is not None
    scales = [grid.scales[0] for grid in (x.grid, y.grid)]
    is_product = kind == "MUL"
    ratios = [math.prod(scales)] if is_product else scales
    low, high = _PRODUCT_RATIOS if is_product else _SUM_RATIOS
    if not all(low <= scale / carrier.scale < high for scale in ratios):
        return None
    x, y = emit.aligned([x, y])
    options = f"{kind.capitalize()}Options"
    return emit.integer(kind, carrier, (shape, x.order), [x, y], options)


def average(
    emit: Emitter, name: str, x: Value, shape: Shape, carrier: StoredCodes, pool: AveragePooling
) -> Value | None:
    """Write an average over equal windows: a depthwise convolution with codes 1.

    Args:
        emit: The file.
        name: Name of the operator.
        x: The input.
        shape: Shape of the output.
        carrier: How to store its codes.
        pool: Options of the average pooling.
    """
    if len(shape) > 4:
        return None
    windows, count = average_windows(pool, x.shape[2:])
    if count is None or math.prod(windows.kernel) > _MAX_WINDOW:
        return None
    mapped, pad = padded_for(emit, as_map(emit, x), windows, name)
    channels, scale = shape[1], 1 / count
    ones = np.ones((1, *windows.kernel, channels), np.int8)
    factor = emit.file.constant("ones", ones, Grid((scale,) * channels, dim=3))
    assert x.grid is not None
    steps = Grid((scale * x.grid.scales[0],) * channels)
    bias = emit.file.constant("zeros", np.zeros(channels, np.int32), steps)
    title = carrier.name if len(shape) == 4 else f"{carrier.name}.map"
    inner = StoredCodes(title, carrier.lowest, carrier.grid, carrier.bits)
    codes = emit.integer(
        "DEPTHWISE_CONV_2D",
        inner,
        ((*shape[:2], *windows.counts), mapped.order),
        [mapped, factor, bias],
        "DepthwiseConv2DOptions",
        **depthwise_options(windows, pad),
    )
    return from_map(emit, codes, shape, carrier.name)
