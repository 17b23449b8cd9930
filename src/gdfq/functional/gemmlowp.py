"""Requantization with two roundings, as gemmlowp, TFLite Micro and CMSIS-NN compute it.

A sum a in int32 becomes a number in units of the next grid by a factor M > 0, written as
M = m 2^(s − 31) with m in 31 bits and a shift s (arXiv 1712.05877, section 2.2):

    round_away(round_up(a 2^max(s, 0) m / 2^31) / 2^max(−s, 0))

round_up rounds halves up, and round_away rounds them away from 0. The first rounding is to a whole
number, so the result differs from the nearest one where a is small and the shift is short.
Functions take and return int64, which holds all products exactly.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_BITS = 31
"""Bits of a multiplier."""
_MAX_SUM = 2**31 - 1


def quantized_multiplier(factor: float) -> tuple[int, int]:
    """Return m and s of M = m 2^(s − 31), m in [2^30, 2^31) apart from M = 0.

    Args:
        factor: M.
    """
    fraction, shift = math.frexp(factor)
    multiplier = math.floor(fraction * 2**_BITS + 0.5)
    if multiplier == 2**_BITS:
        multiplier, shift = multiplier // 2, shift + 1
    return (0, 0) if shift < -_BITS else (multiplier, shift)


def doubling_high_product(a: Tensor, multiplier: Tensor | int) -> Tensor:
    """Return a m / 2^31, halves rounded up."""
    doubled: Tensor = a * multiplier + 2 ** (_BITS - 1)
    return doubled.bitwise_right_shift(_BITS)


def rounding_right_shift(a: Tensor, exponent: Tensor | int) -> Tensor:
    """Return a / 2^exponent, halves rounded away from 0."""
    mask = torch.ones_like(a).bitwise_left_shift(exponent) - 1
    threshold = mask.bitwise_right_shift(1) + (a < 0).long()
    return a.bitwise_right_shift(exponent) + ((a & mask) > threshold).long()


def requantized(a: Tensor, factors: float | Sequence[float], dim: int = 0) -> Tensor:
    """Return sums in units of the next grid, rounded twice.

    Args:
        a: Sums, int64 within int32.
        factors: M, of each entry of a dimension or of all.
        dim: This dimension.

    Raises:
        OverflowError: A number leaves int32, where the result depends on the processor.
    """
    every = [factors] if isinstance(factors, float) else list(factors)
    shape = [1] * a.ndim
    if len(every) > 1:
        shape[dim] = -1
    multipliers, shifts = (
        torch.tensor(part, dtype=torch.int64, device=a.device).reshape(shape)
        for part in zip(*map(quantized_multiplier, every), strict=True)
    )
    shifted = a << shifts.clamp(min=0)
    if int(shifted.abs().max() if shifted.numel() else 0) > _MAX_SUM:
        raise OverflowError("a sum leaves int32")
    return rounding_right_shift(doubling_high_product(shifted, multipliers), (-shifts).clamp(min=0))


_SUM_BITS = 20
"""Bits by which the terms of a sum are shifted to the left before they are scaled."""


def requantized_sum(
    x: Tensor, y: Tensor, scales: tuple[float, float], scale: float, sign: int = 1
) -> Tensor:
    """Return x Δ_x ± y Δ_y in units of Δ: each term is rounded, and then the sum.

    Args:
        x: Whole numbers u = q − z of the first term.
        y: Of the second term.
        scales: Δ_x and Δ_y.
        scale: Δ.
        sign: 1 for a sum, −1 for a difference.
    """
    twice = 2 * max(scales)
    first, second = (
        requantized(term << _SUM_BITS, own / twice)
        for term, own in zip((x, y), scales, strict=True)
    )
    return requantized(first + sign * second, twice / (2**_SUM_BITS * scale))
