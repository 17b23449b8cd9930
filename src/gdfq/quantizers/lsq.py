"""Quantizers whose grids are learned with the network (LSQ, arXiv 1902.08153).

Both start at the grid of least error, which a search finds, and are then trained in units of their
grid: a weight as latent codes, a scale by its logarithm. So a learning rate has the same effect in
every layer of every network.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gdfq.functional.float_grid import NumberFormat, nearest_
from gdfq.functional.grid import (
    Layout,
    along_channels,
    channel_range,
    code_bounds,
    fake_quantize,
    range_grid,
    weight_grid,
)
from gdfq.functional.losses import inner
from gdfq.functional.rounding import nearest_codes, rounded_for_outputs
from gdfq.quantizers.base import ActivationQuantizer, QuantizedTensor, WeightQuantizer
from gdfq.quantizers.recompute import mark_recomputable

_CANDIDATE_COUNT, _COARSE_STRIDE = 80, 5
"""Number of candidate ranges: the full one times 1, 0.99, 0.98, ...; and the stride of the coarse
search, which comes first for weights."""
_CHUNK_ELEMENTS = 2**18
"""Elements that are rounded together, so that they stay in the cache."""
_SAMPLE_ELEMENTS, _CHANNEL_SAMPLE_ELEMENTS = 2**17, 2**12
"""Elements of an activation, and of one of its channels, that a range search uses."""

RoundInPlace = Callable[[Tensor], Tensor]
"""Rounds numbers in units of the scale, in place, and returns them."""


class LearnedWeight(WeightQuantizer):
    """w_q = Δ (clamp(round(v), −2^(k−1), 2^(k−1) − 1) − z) with latent codes v and scale Δ learned.

    One Δ for each output channel; z stays. ∂round(v)/∂v is taken as 1, and clamped codes get no
    gradient, so ∂w_q/∂Δ = q − z and ∂w_q/∂v = Δ. The weight is read once, at construction.
    """

    reads_weight = False
    scale: Tensor
    zero_point: Tensor

    def __init__(
        self,
        weight: Tensor,
        bits: int,
        layout: Layout,
        groups: int = 1,
        *,
        symmetric: bool = False,
    ) -> None:
        super().__init__(bits, layout, groups)
        self.symmetric = symmetric
        weight = weight.detach()
        scale, zero_point = best_weight_grid(weight, bits, layout, groups, symmetric=symmetric)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)
        self.codes = nn.Parameter(within_bounds(weight / scale + zero_point, bits))
        self.log_scale = nn.Parameter(torch.zeros_like(scale))

    def forward(self, weight: Tensor) -> Tensor:  # noqa: ARG002 (it was read at construction)
        inside = self.codes.clamp(*code_bounds(self.bits))
        rounded = inside + (inside.round() - inside).detach()
        return (rounded - self.zero_point) * (self.scale * self.log_scale.exp())

    @torch.no_grad()
    def rescale_(self, factor: Tensor) -> None:
        """Multiply each output channel by its factor [O] > 0; the codes stay."""
        self.scale.mul_(self.along_channels(factor, self.codes))

    @torch.no_grad()
    def fit_(self, weight: Tensor, inputs: Tensor, ridge: Tensor) -> None:
        scale, zero_point = best_weight_grid(
            weight, self.bits, self.layout, self.groups, symmetric=self.symmetric
        )
        rows, steps, zeros = (
            part.to(inputs.dtype).reshape(len(inputs), -1, columns)
            for part, columns in ((weight, inputs.shape[-1]), (scale, 1), (zero_point, 1))
        )
        nearest = nearest_codes(zeros, self.bits)
        latent, steps = rounded_for_outputs(rows, inputs, ridge, steps, nearest, self.bits)
        codes = (latent + zeros).view_as(weight).to(weight.dtype)
        self.scale.copy_(steps.view_as(scale))
        self.log_scale.zero_()
        self.zero_point.copy_(zero_point)
        self.codes.copy_(within_bounds(codes, self.bits))

    @torch.no_grad()
    def quantized(self, weight: Tensor) -> QuantizedTensor:  # noqa: ARG002
        codes = self.codes.clamp(*code_bounds(self.bits)).round().to(torch.int8)
        scale = self.scale * self.log_scale.exp()
        return QuantizedTensor(codes, scale, self.zero_point, self.bits)


class LearnedRange(ActivationQuantizer):
    """Per-tensor grid that starts at the range of least square error and then learns its scale.

    Over several batches the starting scale is the mean of theirs, and z that of the first. The
    range contains 0, and is then widened by `reach`. A known range is covered as it is.
    """

    clips_gradient = True
    scale: Tensor
    zero_point: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__(bits)
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("zero_point", torch.zeros(()))
        self.log_scale = nn.Parameter(torch.zeros(()))

    def fake_quantize(self, x: Tensor) -> Tensor:
        return learned_scale(x, self._learned(), self.zero_point, self.bits)

    def _learned(self) -> Tensor:
        return self.limited(self.scale * self.log_scale.exp(), self.zero_point)

    def _update_(self, parts: Sequence[Tensor]) -> None:
        if self.known_range is None:
            scale, zero_point = best_range_of_parts(parts, self.bits, symmetric=self.symmetric)
            scale = scale * self.reach
        else:
            ends = parts[0].amin(), parts[0].amax()
            scale, zero_point = range_grid(*ends, self.bits, symmetric=self.symmetric)
        if self.batches == 1:
            self.scale.copy_(scale)
            self.zero_point.copy_(zero_point)
        else:
            self.scale.lerp_(scale, 1 / float(self.batches))

    @torch.no_grad()
    def grid(self) -> tuple[Tensor, Tensor]:
        return self._learned(), self.zero_point


def within_bounds(latent: Tensor, bits: int) -> Tensor:
    """Return latent codes that round to the bounds where they were beyond; they stay clipped."""
    low, high = code_bounds(bits)
    return latent.clamp(low - 0.49, high + 0.49)


def best_weight_grid(
    weight: Tensor, bits: int, layout: Layout, groups: int = 1, *, symmetric: bool = False
) -> tuple[Tensor, Tensor]:
    """Return scale and zero point of each output channel with the least Σ|w_q − w|^2.4.

    Candidates shrink the channel's range from both ends, or only its upper end, or only its
    lower one: first by 5 %, then by 1 % around the best of each channel.

    Args:
        weight: The weight, with output channels as `layout` says.
        bits: Bits of a code.
        layout: Which dimension holds the output channels.
        groups: Groups of a convolution.
        symmetric: Whether zero points must be 0.

    Returns:
        Scale and zero point, shaped to broadcast against the weight.
    """
    grid_of = partial(weight_grid, bits=bits, symmetric=symmetric)
    low, high = channel_range(weight, layout, groups)

    def best_of(ranges: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        least, best = torch.full_like(low, torch.inf), (low, high)
        for ends in ranges:
            rounded = fake_quantize(weight, *grid_of(*ends), bits)
            error = channel_sum((rounded - weight).abs().pow(2.4), layout, groups)
            better = error < least
            least = torch.where(better, error, least)
            best = torch.where(better, ends[0], best[0]), torch.where(better, ends[1], best[1])
        return best

    shrinks = [1 - i / 100 for i in range(0, _CANDIDATE_COUNT, _COARSE_STRIDE)]
    coarse = best_of(
        (a * low, b * high)
        for shrink in shrinks
        for a, b in ((shrink, shrink), (1, shrink), (shrink, 1))
    )
    # Of a range that was shrunk from one end, only that end is refined.
    whole = (coarse[0] == low) & (coarse[1] == high)
    low_share = torch.where((coarse[0] != low) | whole, low / 100, 0)
    high_share = torch.where((coarse[1] != high) | whole, high / 100, 0)
    fine = best_of(
        (coarse[0] + i * low_share, coarse[1] + i * high_share)
        for i in range(1 - _COARSE_STRIDE, _COARSE_STRIDE)
    )
    return grid_of(*fine)


def channel_sum(error: Tensor, layout: Layout, groups: int) -> Tensor:
    """Return the sum over each output channel, shaped to broadcast against the weight."""
    if layout is Layout.ROWS:
        return error.flatten(1).sum(1).view(-1, *[1] * (error.ndim - 1))
    rows = error.unflatten(0, (groups, -1)).sum(1)  # [g, O/g, *k]
    sums = rows.flatten(2).sum(2).flatten()
    return along_channels(sums, error, layout, groups)


def best_range(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return scale and zero point, both scalars, that give x the least mean square error.

    The range contains 0. The search uses an evenly spread sample of x.
    """
    return best_range_of_parts([x], bits)


def best_range_of_parts(
    parts: Sequence[Tensor], bits: int, *, symmetric: bool = False
) -> tuple[Tensor, Tensor]:
    """Return `best_range` of a batch in parts [n, ...]: the same values without the whole batch.

    With `symmetric` the zero point is 0.
    """
    sample, low, high = sample_of_parts(parts)
    ends = low.view(1, 1), high.view(1, 1)
    scale, zero_point = _best_ranges(sample[None], *ends, bits, symmetric=symmetric)
    return scale.view(()), zero_point.view(())


def sample_of_parts(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return an evenly spread sample [M] of a batch in parts, and its minimum and maximum."""
    stride = _stride(sum(part.numel() for part in parts), _SAMPLE_ELEMENTS)
    samples, lows, highs, passed = [], [], [], 0
    for part in parts:
        flat = part.flatten()
        samples.append(flat[-passed % stride :: stride])
        lows.append(flat.amin())
        highs.append(flat.amax())
        passed += len(flat)
    sample = samples[0] if len(samples) == 1 else torch.cat(samples)
    return sample, torch.stack(lows).amin(), torch.stack(highs).amax()


def scales_of_channels(x: Tensor, bits: int) -> Tensor:
    """Return the scale of `best_range` for each channel of x [N, C, *] alone, within 5 %: [C]."""
    rows = x.transpose(0, 1).flatten(1)
    sample = rows[:, :: _stride(rows.shape[1], _CHANNEL_SAMPLE_ELEMENTS)]
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    return _best_ranges(sample, low, high, bits, every=_COARSE_STRIDE)[0].view(-1)


def _stride(numbers: int, most: int) -> int:
    """Return the stride of a sample with about `most` of `numbers` elements.

    It is odd: an even one may visit the same columns of each row of an image, such as the border.
    """
    return numbers // most | 1


def _best_ranges(
    sample: Tensor,
    low: Tensor,
    high: Tensor,
    bits: int,
    *,
    every: int = 1,
    symmetric: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return scale and zero point, [R, 1], that suit each row of a sample [R, M] best.

    Args:
        sample: [R, M].
        low: Minimum of all elements of each row, [R, 1].
        high: Maximum of all elements of each row, [R, 1].
        bits: Bits of a code.
        every: Stride over the candidate ranges.
        symmetric: Whether zero points must be 0.
    """
    grid_of = partial(range_grid, bits=bits, symmetric=symmetric)
    low, high = low.clamp(max=0), high.clamp(min=0)
    least = torch.full_like(low, torch.inf)
    best = grid_of(low, high)
    for i in range(0, _CANDIDATE_COUNT, every):
        grid = grid_of(low * (1 - i / 100), high * (1 - i / 100))
        errors = (fake_quantize(sample, *grid, bits) - sample).square().mean(1, keepdim=True)
        better = errors < least
        least = torch.where(better, errors, least)
        best = torch.where(better, grid[0], best[0]), torch.where(better, grid[1], best[1])
    return best


Bound = Any
"""The lowest or highest code without its zero point, a float or a scalar tensor: see `_number`.

PyTorch's annotations of `clamp_` do not know this union.
"""


def _number(scalar: Tensor) -> Bound:
    """Return a scalar as a number on a CPU, where clamping by tensors is several times slower.

    A GPU would wait until it is read.
    """
    return float(scalar) if scalar.device.type == "cpu" else scalar


class _LearnedScale(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, low: Bound, high: Bound, round_: RoundInPlace
    ) -> Tensor:
        quantized = _on_grid(x, scale, low, high, round_)
        make = partial(_on_grid, x.detach(), scale.detach(), low, high, round_)
        ctx.slot = mark_recomputable(quantized, make)
        ctx.save_for_backward(x, scale)
        ctx.grid = (low, high, round_)
        return quantized

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x, scale = ctx.saved_tensors
        (grad,) = grads
        quantized = ctx.slot.pop(partial(_on_grid, x, scale, *ctx.grid))
        low, high = (bound * _number(scale) for bound in ctx.grid[:2])
        if x.device.type == "cpu":
            grad_x = torch.ops.aten.hardtanh_backward(grad, x, low, high)  # grad inside, 0 outside
        else:
            grad_x = torch.where((x > low) & (x < high), grad, 0.0)
        grad_scale = (inner(grad, quantized) - inner(grad_x, x)) / scale
        return grad_x, grad_scale.view_as(scale), None, None, None


@torch.no_grad()
def _on_grid(x: Tensor, scale: Tensor, low: Bound, high: Bound, round_: RoundInPlace) -> Tensor:
    """Return x rounded to its grid, in its own memory layout.

    On a CPU new memory and bandwidth cost more than arithmetic: one tensor is allocated, and the
    operations run in place over chunks that stay in the cache.
    """
    quantized = torch.empty_like(x)
    order = sorted(range(x.ndim), key=x.stride, reverse=True)
    parts = [(x, quantized)]
    if x.device.type == "cpu" and x.permute(order).is_contiguous():
        whole = (tensor.permute(order).view(-1).split(_CHUNK_ELEMENTS) for tensor in (x, quantized))
        parts = list(zip(*whole, strict=True))
    for old, new in parts:
        round_(torch.div(old, scale, out=new)).clamp_(low, high).mul_(scale)
    return quantized


def learned_scale(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Return `fake_quantize` of x with the gradients of LSQ (arXiv 1902.08153, equations 3 and 5).

    With u = x/Δ and q − z the code without its zero point:
    ∂x_q/∂x = 1 inside the range and 0 outside; ∂x_q/∂Δ = (q − z) − u inside and q − z outside.

    Args:
        x: Any shape.
        scale: Δ, a scalar.
        zero_point: z, a scalar.
        bits: Bits of a code.
    """
    low, high = (bound - _number(zero_point) for bound in code_bounds(bits))
    result: Tensor = _LearnedScale.apply(x, scale, low, high, Tensor.round_)
    return result


def learned_float_scale(x: Tensor, scale: Tensor, form: NumberFormat) -> Tensor:
    """Return `fake_quantize_float` of x with the gradients of LSQ, as `learned_scale` has them.

    The number F of the format takes the place of q − z: ∂x_q/∂Δ = F − u inside the range of the
    format and F outside.

    Args:
        x: Any shape.
        scale: Δ, a scalar.
        form: The format.
    """
    rounding = partial(nearest_, form=form)
    result: Tensor = _LearnedScale.apply(x, scale, form.lowest, form.largest, rounding)
    return result
