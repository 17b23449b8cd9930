"""The affine grid of k bits, as pure functions.

Equation Q1 (arXiv 2003.03603; `docs/equations.md`), for a range [l, u] and k bits:

    Δ = (u − l) / (2^k − 1)
    q = clamp(round(x / Δ) + z, −2^(k−1), 2^(k−1) − 1)
    x_q = Δ (q − z)

z is the integer zero point that maps l to the lowest code, written in the sign convention of
ONNX and PyTorch (the paper's z₀ is −z). Rounding is half to even and happens before z is
added, as in ONNX's QuantizeLinear.
"""

import math
import re
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from gdfq.errors import UsageError
from gdfq.files.plain_values import tagged

MIN_BITS, MAX_BITS = 2, 8
UNSATURATED_BITS = 7
"""Most bits of weights with which sums of two products with 8-bit activations fit into 16 bits."""
_MAX_UNSATURATED_CODE = 64
"""The largest |q − z| of such weights: 2 · 255 · 64 < 2^15."""
_MAX_BIAS_CODE = 2**30
"""Half the range of 32 signed bits: the other half is reserved for the sum of the products."""


FLOAT_BITS = (4, 8)
"""Numbers of bits that floating-point grids have (`gdfq.functional.float_grid`)."""


UNROUNDED = 16
"""Bits that stand for activations that stay float, as in w4a16."""


@tagged("Bits", added={"float_weights": False, "float_activations": False})
@dataclass(frozen=True)
class Bits:
    """Bits of weights and activations, each 2..8, or 4 or 8 on floating-point grids.

    Attributes:
        weights: Bits of weights.
        activations: Bits of activations; 16 for those that stay float.
        float_weights: Whether the grids of weights are floating-point ones.
        float_activations: Whether those of activations are.
    """

    weights: int
    activations: int
    float_weights: bool = False
    float_activations: bool = False

    def __post_init__(self) -> None:
        for what, k, is_float in (
            ("weights", self.weights, self.float_weights),
            ("activations", self.activations, self.float_activations),
        ):
            if is_float and k not in FLOAT_BITS:
                raise UsageError(
                    f"{what} on floating-point grids need 4 or 8 bits; got {k}. "
                    "Write the bits as for instance wfp8afp8 or wfp4afp8."
                )
            unrounded = what == "activations" and k == UNROUNDED
            if not MIN_BITS <= k <= MAX_BITS and not unrounded:
                raise UsageError(
                    f"{what} need {MIN_BITS} to {MAX_BITS} bits; got {k}. "
                    "Write the bits as for instance w4a4 or w4a8."
                )

    @classmethod
    def parse(cls, text: str) -> "Bits":
        """Read text such as `w4a8`, or `wfp4afp8` for floating-point grids.

        Raises:
            UsageError: The text has another form, or the bits are out of range.
        """
        form = r"w(fp)?([0-9]{1,2})a(fp)?([0-9]{1,2})"
        match = re.fullmatch(form, text.strip().lower())
        if match is None:
            raise UsageError(
                "bits are written w<weights>a<activations>, each 2..8, or fp4 or fp8; "
                f"got {text!r}. Use for instance w4a4, w3a3, w4a8 or wfp8afp8."
            )
        return cls(int(match[2]), int(match[4]), bool(match[1]), bool(match[3]))

    def __str__(self) -> str:
        weights, activations = (
            "fp" if is_float else "" for is_float in (self.float_weights, self.float_activations)
        )
        return f"w{weights}{self.weights}a{activations}{self.activations}"


class Layout(Enum):
    """Which dimension of a weight holds its output channels."""

    ROWS = "rows"  # convolution [O, I/g, *k] and linear [O, I]
    TRANSPOSED = "transposed"  # transposed convolution [I, O/g, *k]


def code_bounds(bits: int) -> tuple[int, int]:
    """Return the lowest and the highest signed code of `bits` bits."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def affine_grid(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return scale and zero point of the grid that spans [low, high] (Q1), elementwise.

    A range without extent is widened to contain 0, so that a constant is represented exactly. A
    range that is only 0 gets the scale 1.

    Args:
        low: Lower ends, of any shape.
        high: Upper ends, of the same shape.
        bits: k.

    Returns:
        Scale (> 0) and zero point (integers in the dtype of `low`), both shaped as `low`.
    """
    flat = high <= low
    low = torch.where(flat, low.clamp(max=0), low)
    high = torch.where(flat, high.clamp(min=0), high)
    scale = (high - low) / (2**bits - 1)
    scale = torch.where(scale < torch.finfo(scale.dtype).tiny, torch.ones_like(scale), scale)
    zero_point = code_bounds(bits)[0] - (low / scale).round()
    return scale, zero_point


def symmetric_grid(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return scale and zero point of the grid of zero point 0 that covers [low, high].

    The scale is m / (2^(k−1) − 1) with m = max(|low|, |high|). A range that is only 0 gets the
    scale 1.

    Args:
        low: Lower ends, of any shape.
        high: Upper ends, of the same shape.
        bits: k.

    Returns:
        Scale (> 0) and zero point (0 in the dtype of `low`), both shaped as `low`.
    """
    scale = torch.maximum(high.abs(), low.abs()) / code_bounds(bits)[1]
    scale = torch.where(scale < torch.finfo(scale.dtype).tiny, torch.ones_like(scale), scale)
    return scale, torch.zeros_like(scale)


def range_grid(low: Tensor, high: Tensor, bits: int, *, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Return the grid over a range: `symmetric_grid`, or else `affine_grid`."""
    return (symmetric_grid if symmetric else affine_grid)(low, high, bits)


UNLIMITED = (-math.inf, math.inf)
"""Limits of values that have none."""


_LEAST_LAST_STEP = 0.55
"""How far, in steps, a limit lies beyond the last code but one: more than 1/2 rounds to the last.
The rest is for changes of the scale by 10^-4 afterwards (`student.ties`), which 8 bits multiply."""


def largest_scale(zero_point: Tensor, bits: int, limits: tuple[float, float]) -> Tensor:
    """Return the largest scale with which limits round to the last codes of a grid, or beyond.

    Ending exactly at both limits would cost a grid with a code less above 0 than below, as that of
    a hardtanh has, half a step at each end. The codes of such a grid saturate where the values do,
    so a runtime needs no clip between a layer and its codes: a ReLU6, say, is part of the rounding.

    Args:
        zero_point: Zero points, of any shape.
        bits: k.
        limits: Lowest <= 0 and highest >= 0 value that the tensor can have.

    Returns:
        Scales (> 0, infinite without limits), shaped as `zero_point`.
    """
    lowest, highest = code_bounds(bits)
    below, above = zero_point - lowest, highest - zero_point
    scales = [
        torch.where(steps > 0, abs(limit) / (steps.clamp(min=1) - 1 + _LEAST_LAST_STEP), torch.inf)
        for limit, steps in zip(limits, (below, above), strict=True)
    ]
    return torch.minimum(*scales)


def clips_alike(limits: tuple[float, float], scale: Tensor, zero_point: Tensor, bits: int) -> bool:
    """Return whether a grid clips all that a clamp with these limits does.

    The clamp then changes no code.
    """
    low, high = (float((limit / scale).round() + zero_point) for limit in limits)
    lowest, highest = code_bounds(bits)
    return low <= lowest and high >= highest


def weight_grid(
    low: Tensor, high: Tensor, bits: int, *, symmetric: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the `affine_grid` of weights, whose codes minus zero point fit into 8 signed bits.

    Integer runtimes multiply by q − z as one int8 number, and kernels of x86 processors without
    VNNI add two products with 8-bit activations in 16 bits. So |q − z| is 64 at most with up to 7
    bits. Where it could exceed that the range is widened: to contain 0, and at 7 and 8 bits, where
    only z = 0 leaves room, to [−m, m].

    Args:
        low: Lower ends, of any shape.
        high: Upper ends, of the same shape.
        bits: k.
        symmetric: Whether z must be 0 with any number of bits.

    Returns:
        Scale (> 0) and zero point, both shaped as `low`.
    """
    lowest, highest = code_bounds(bits)
    if symmetric or bits >= UNSATURATED_BITS:
        return symmetric_grid(low, high, bits)
    scale, zero_point = affine_grid(low, high, bits)
    reach = torch.maximum(zero_point - lowest, highest - zero_point)
    fits = reach <= _MAX_UNSATURATED_CODE
    wide_scale, wide_zero_point = affine_grid(low.clamp(max=0), high.clamp(min=0), bits)
    return torch.where(fits, scale, wide_scale), torch.where(fits, zero_point, wide_zero_point)


def along_channels(values: Tensor, weight: Tensor, layout: Layout, groups: int = 1) -> Tensor:
    """Return values of the output channels [O], shaped to broadcast against `weight`."""
    ones = [1] * (weight.ndim - 2)
    if layout is Layout.ROWS:
        return values.view(-1, 1, *ones)
    if groups == 1:
        return values.view(1, -1, *ones)
    # Row i of [I, O/g, *k] belongs to group i // (I/g), which owns O/g of the channels.
    rows = weight.shape[0] // groups
    return (
        values.view(groups, weight.shape[1])
        .repeat_interleave(rows, 0)
        .view(weight.shape[0], weight.shape[1], *ones)
    )


def channel_range(weight: Tensor, layout: Layout, groups: int = 1) -> tuple[Tensor, Tensor]:
    """Return minimum and maximum of each output channel, shaped to broadcast against `weight`."""
    if layout is Layout.ROWS:
        channels = weight.flatten(1)
    else:  # [I, O/g, *k] -> [g, I/g, O/g, *k] -> [g, O/g, I/g, *k] -> [O, ...]
        channels = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1).flatten(1)
    low, high = channels.amin(1), channels.amax(1)
    return (
        along_channels(low, weight, layout, groups),
        along_channels(high, weight, layout, groups),
    )


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Return the codes q of Q1, as whole numbers in the dtype of x; the grid broadcasts."""
    low, high = code_bounds(bits)
    return (x / scale).round_().add_(zero_point).clamp_(low, high)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Return the numbers x_q of codes (Q1), in the dtype of the scale.

    Codes [O, I] may have scales and zero points [O, B] of B blocks of columns each (`block_size`).
    `bits` does not enter the value; writers of files read from it how many bits a code needs.
    """
    scale, zero_point = (along_blocks(values, codes) for values in (scale, zero_point))
    return (codes.to(scale.dtype) - zero_point) * scale


def block_size(columns: int, most: int) -> int:
    """Return the columns of a block, for blocks of one size with at most `most` columns each.

    The last block is smaller where they do not divide. 172 columns in blocks of at most 64 are
    blocks of 58, 58 and 56.
    """
    return -(-columns // -(-columns // most))


def of_columns(values: Tensor, columns: int) -> Tensor:
    """Return values [..., B] of blocks, one for each block, as those of all columns, [..., K].

    Args:
        values: A value for each of B blocks of ⌈K / B⌉ columns, of which the last may be smaller.
        columns: K.
    """
    size = -(-columns // values.shape[-1])
    return values.repeat_interleave(size, -1)[..., :columns]


def along_blocks(values: Tensor, codes: Tensor) -> Tensor:
    """Return values [O, B] of blocks as [O, I], to broadcast against codes; any others as given."""
    if values.ndim != 2 or codes.ndim != 2 or not 1 < values.shape[1] < codes.shape[1]:
        return values
    return of_columns(values, codes.shape[1])


def dequantize_bias(codes: Tensor, activation_scale: Tensor, weight_scale: Tensor) -> Tensor:
    """Return the bias b = Δ_x Δ_w q [O] of a layer with input scale Δ_x and weight scales Δ_w.

    On this grid it adds to the integer products of activations and weights (arXiv 1712.05877,
    section 2.4).

    Args:
        codes: q, int32 [O].
        activation_scale: Δ_x, a scalar.
        weight_scale: Δ_w, [O, 1, ...].
    """
    return codes.to(weight_scale.dtype) * (activation_scale * weight_scale.flatten())


def quantize_bias(bias: Tensor, activation_scale: Tensor, weight_scale: Tensor) -> Tensor:
    """Return the codes of `dequantize_bias`, int32 [O], clipped to ±2^30."""
    scale = (activation_scale * weight_scale.flatten()).double()
    return (bias.double() / scale).round().clamp(-_MAX_BIAS_CODE, _MAX_BIAS_CODE).to(torch.int32)


def room_for_bias(bias: Tensor, activation_scale: Tensor, weight_scale: Tensor) -> Tensor:
    """Return the factors >= 1 on the weight scales that make the codes of the bias fit.

    A channel whose weights are almost 0 has a scale so small that the code of its bias would
    overflow.

    Args:
        bias: [O].
        activation_scale: A scalar.
        weight_scale: [O, 1, ...].

    Returns:
        Factors, shaped as `weight_scale`.
    """
    scale = activation_scale.double() * weight_scale.double()
    return (bias.double().abs().view_as(scale) / (scale * _MAX_BIAS_CODE)).clamp(min=1)


def fake_quantize_tokens(x: Tensor, bits: int) -> Tensor:
    """Return x rounded with one symmetric scale for each token, found where it is computed.

        Δ = max|x| / (2^(k−1) − 1), x_q = Δ round(x / Δ), over the last dimension

    (arXiv 2310.08041, section 3: dynamic quantization by token). A token that is only 0 stays so.

    Args:
        x: [..., K].
        bits: k.
    """
    scale = token_scales(x, bits)
    return (x / scale).round_().mul_(scale)


def token_scales(x: Tensor, bits: int) -> Tensor:
    """Return the scale Δ of each token, [..., 1], as in `fake_quantize_tokens`; 1 of one of 0."""
    scale = x.abs().amax(-1, keepdim=True) / code_bounds(bits)[1]
    return torch.where(scale < torch.finfo(scale.dtype).tiny, torch.ones_like(scale), scale)


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Return x rounded to its grid (Q1): dequantize(quantize(x))."""
    return quantize(x, scale, zero_point, bits).sub_(zero_point).mul_(scale)


class _TokensStraightThrough(torch.autograd.Function):
    """`fake_quantize_tokens` with the derivative 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int) -> Tensor:
        return fake_quantize_tokens(x, bits)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def tokens_straight_through(x: Tensor, bits: int) -> Tensor:
    """Return `fake_quantize_tokens` of x with the straight-through estimator ∂x_q/∂x = 1 (Q2)."""
    result: Tensor = _TokensStraightThrough.apply(x, bits)
    return result


class _StraightThrough(torch.autograd.Function):
    """Fake quantization whose derivative is taken as 1 everywhere, clipped values included."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
        return fake_quantize(x, scale, zero_point, bits)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return grads[0], None, None, None


def straight_through(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Return `fake_quantize` of x with the straight-through estimator ∂x_q/∂x = 1 (Q2)."""
    result: Tensor = _StraightThrough.apply(x, scale, zero_point, bits)
    return result
