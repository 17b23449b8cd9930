"""Arithmetic of integer runtimes on whole numbers, as pure functions on float32 tensors.

A layer whose input and weight are quantized, x = Δ_x u and w = Δ_w v with whole numbers u and v,
adds products of whole numbers, and its bias c counts in units of Δ_x Δ_w (arXiv 1712.05877,
section 2.2):

    y = Δ_x Δ_w a,   a = Σ u v + c

Runtimes add in int32, exactly. So does float32 while all sums stay below 2^24, whatever the order;
`exact_parts` splits the weight of larger layers; what cannot be split is added in float64. The next
grid (Δ_y, z) rounds once:

    q − z = clamp(round(a · Δ_x Δ_w / Δ_y), lowest − z, highest − z)

which is how ONNX Runtime's kernels compute it: one factor in float32, rounding half to even. The
mean of n values on a grid is such a sum, too, with the factor Δ_x / (Δ_y n).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gdfq.functional.grid import code_bounds

_EXACT = 2**24
"""Whole numbers up to here are exact in float32."""
_MAX_OFFSET = 255
"""Largest |q − z| of an activation."""


def values(u: Tensor, scale: Tensor) -> Tensor:
    """Return Δ u."""
    return u * scale


def offset_bounds(zero_point: Tensor, bits: int) -> tuple[float, float]:
    """Return the lowest and the highest q − z that codes of `bits` bits have."""
    lowest, highest = (float(bound - zero_point) for bound in code_bounds(bits))
    return lowest, highest


def exact_parts(codes: Tensor, zero_point: Tensor, largest: float, groups: int = 1) -> int:
    """Return into how many parts the input channels must be split so that their sums are exact.

    Args:
        codes: Codes of a weight [O, I, *k].
        zero_point: Its zero points, which broadcast to it.
        largest: The largest |u| of the input.
        groups: Groups of the layer; the inputs of several groups are not split.

    Returns:
        The number of parts, or 0 where float32 is exact with none.
    """
    by_input = (codes.double() - zero_point).abs().reshape(*codes.shape[:2], -1).sum(2)  # [O, I]
    numbers = range(1, 1 + (by_input.shape[1] if groups == 1 else 1))

    def reach(parts: int) -> float:
        return largest * max(float(p.sum(1).max()) for p in by_input.tensor_split(parts, 1))

    if reach(numbers[-1]) > _EXACT:
        return 0
    return next(parts for parts in numbers if reach(parts) <= _EXACT)


def is_exact(bias: Tensor) -> bool:
    """Return whether float32 holds each code of a bias, as all up to 2^24.

    A float32 addition to an exact sum then rounds once.
    """
    return bias.double().equal(bias.float().double())


def products(
    layer: Callable[..., Tensor],
    parts: int,
    u: Tensor,
    codes: Tensor,
    zero_point: Tensor,
    *options: Any,
) -> Tensor:
    """Return Σ u v of a convolution or linear layer, exact.

    Args:
        layer: The operator (input, weight, bias, *options).
        parts: Parts of the input channels whose sums are exact in float32 (see `exact_parts`).
        u: Input [N, I, *].
        codes: Codes of the weight.
        zero_point: Its zero points.
        *options: Stride, padding and so on.

    Returns:
        Sums [N, O, *]: float32 of one part, else float64.
    """
    dtype = torch.float32 if parts else torch.float64
    u, v = u.to(dtype), codes.to(dtype) - zero_point
    if parts <= 1:
        return layer(u, v, None, *options)
    dim = 1 if v.ndim > 2 else -1
    pairs = zip(u.tensor_split(parts, dim), v.tensor_split(parts, 1), strict=True)
    first, *others = (layer(x, w, None, *options) for x, w in pairs)
    total = first.double()
    for sums in others:
        total += sums
    return total


def with_bias(sums: Tensor, bias: Tensor, dim: int, exact: bool) -> Tensor:
    """Return a = Σ u v + c rounded to float32 once, as int32 becomes float32.

    Args:
        sums: [N, O, *].
        bias: c, int32 [O].
        dim: The dimension of the channels.
        exact: Whether float32 holds each code of the bias.
    """
    shape = [1] * sums.ndim
    shape[dim] = -1
    if exact and sums.dtype == torch.float32:
        return sums + bias.view(shape)
    return sums.double().add_(bias.view(shape)).float()


def along(scale: Tensor, count: int, dim: int) -> Tensor:
    """Return scales of a weight as the channels of an output with `count` dimensions."""
    shape = [1] * count
    shape[dim] = -1
    return scale.flatten().view(shape)


def rescaled(a: Tensor, input_scale: Tensor, weight_scale: Tensor, dim: int) -> Tensor:
    """Return y = Δ_x Δ_w a."""
    return a * along(input_scale * weight_scale, a.ndim, dim)


def in_steps(
    a: Tensor, input_scale: Tensor, weight_scale: Tensor, dim: int, scale: Tensor
) -> Tensor:
    """Return y / Δ_y = a · Δ_x Δ_w / Δ_y, with one factor for each channel."""
    return a * along(input_scale * weight_scale / scale, a.ndim, dim)


def steps_of(x: Tensor, scale: Tensor) -> Tensor:
    """Return x / Δ."""
    return x / scale


def mean_in_steps(
    u: Tensor, dims: Sequence[int], keepdim: bool, input_scale: Tensor, scale: Tensor
) -> Tensor:
    """Return y / Δ_y = Σ u · Δ_x / (Δ_y n) of a mean y over n values on a grid, its sum exact.

    Args:
        u: Whole numbers [N, *], at most 255 in magnitude.
        dims: The dimensions of the mean.
        keepdim: Whether they stay, of size 1.
        input_scale: Δ_x.
        scale: Δ_y.
    """
    count = math.prod(u.shape[dim] for dim in dims)
    dtype = torch.float32 if count * _MAX_OFFSET <= _EXACT else torch.float64
    sums = u.sum(tuple(dims), keepdim, dtype=dtype).float()
    return sums * (input_scale / (scale * count))


def rounded(steps: Tensor, lowest: float, highest: float) -> Tensor:
    """Return u = q − z of numbers in units of Δ, half to even, within the bounds of u."""
    return steps.clamp(lowest, highest).round_()
