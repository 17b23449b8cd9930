"""Mean and variance of channels, with gradients, at little more than the cost of reading.

The statistics loss needs mean and variance of *every* batch norm's input. Written with
`x.mean()` and `x.var()` they cost as much as the network itself. Here the batch norm (in
evaluation form a scale and shift per channel) and the moments of its input are one operator:

    y = s x + t;   m = E[x];   v = E[(x − m)²]
    ∂x = s ∂y + (2/n) ∂v x + (∂m − 2 ∂v m)/n        n elements a channel

so the backward pass is two fused multiply-adds over the tensor, exact to rounding. A clamp of y
that passes gradients strictly inside its ends, such as a ReLU6, is part of the operator. Only x is
saved: y, which says where gradients pass, is computed again, a few images at a time.
`benchmarks/speed.py` compares the formulations.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gdfq.execution.precision import to_float32


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of each channel of x [N, C, *], both [C]; no gradients."""
    if x.device.type != "cpu":
        return _mean_first(torch.var_mean(x, [d for d in range(x.ndim) if d != 1], correction=0))
    last = x.movedim(1, -1)
    if x.ndim < 3 or not last.is_contiguous():
        return _by_training_kernel(x)
    # Values side by side in memory are counted as channels of their own: the kernel goes along
    # channels, and sums of fewer values are more exact.
    channels = x.shape[1]
    rows = x.numel() // channels
    most = max(1, _KERNEL_CHANNELS // channels)
    beside = math.gcd(rows, 1 << most.bit_length() - 1)
    means, variances = _by_training_kernel(last.reshape(rows // beside, beside * channels))
    mean, between = _mean_first(torch.var_mean(means.view(beside, channels), 0, correction=0))
    return mean, variances.view(beside, channels).mean(0) + between


_KERNEL_CHANNELS = 256
"""Channels at which the kernel is fast."""


def _by_training_kernel(x: Tensor) -> tuple[Tensor, Tensor]:
    """The moments kernel of the training batch norm: ten times faster than var_mean on CPUs."""
    channels = x.new_zeros(x.shape[1])
    mean, variance = torch.batch_norm_update_stats(x, channels, channels.clone(), 0.0)
    return mean, variance


def _mean_first(variance_and_mean: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    variance, mean = variance_and_mean
    return mean, variance


class _NormWithMoments(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, low: float, high: float
    ) -> tuple[Tensor, ...]:
        mean, variance = moments(x)
        ctx.ends = (low, high)
        ctx.save_for_backward(x, scale, shift, mean)
        y = torch.empty_like(x)
        for x_part, y_part in _parts(x, y):
            torch.addcmul(shift, x_part, scale, out=y_part)
            if ctx.ends != UNCLAMPED:
                F.hardtanh_(y_part, low, high)
        return y, mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        grad_y, grad_mean, grad_variance = grads
        x, scale, shift, mean = ctx.saved_tensors
        offset, slope = _line(x, mean, grad_mean, grad_variance)
        grad_x = torch.empty_like(x)
        for x_part, y_part, part in _parts(x, grad_y, grad_x):
            if ctx.ends != UNCLAMPED:
                unclamped = torch.addcmul(shift, x_part, scale, out=part)
                y_part = torch.ops.aten.hardtanh_backward(y_part, unclamped, *ctx.ends)
            torch.addcmul(offset, x_part, slope, out=part).addcmul_(y_part, scale)
        return grad_x, None, None, None, None


class _Moments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, variance = moments(x)
        ctx.save_for_backward(x, mean)
        return mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        offset, slope = _line(x, mean, *grads)
        return torch.addcmul(offset, x, slope)


def _line(
    x: Tensor, mean: Tensor, grad_mean: Tensor, grad_variance: Tensor
) -> tuple[Tensor, Tensor]:
    """Return a and b of the moments' part a + b x of ∂x, both [1, C, 1, ...]."""
    n = x.numel() / mean.numel()
    slope = (2 / n) * grad_variance
    offset = grad_mean / n - slope * mean
    shape = (1, -1, *[1] * (x.ndim - 2))
    return offset.view(shape), slope.view(shape)


_PART_ELEMENTS = 2**21
"""8 MiB: work space stays small, and what one operator wrote the next finds in the cache."""


def _parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the tensors [N, ...] in parts of a few images; on other devices than CPUs, whole."""
    first = tensors[0]
    count = -(-first.numel() // _PART_ELEMENTS) if first.device.type == "cpu" else 1
    if count <= 1:
        yield tensors
    else:
        yield from zip(*(tensor.chunk(count) for tensor in tensors), strict=True)


UNCLAMPED = (-math.inf, math.inf)
"""The ends of a clamp that does nothing."""


def norm_with_moments(
    x: Tensor, scale: Tensor, shift: Tensor, ends: tuple[float, float] = UNCLAMPED
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y = clamp(s x + t), and mean and biased variance of each channel of x.

    All have gradients; the clamp passes them strictly inside its ends, as a ReLU6 does.

    Args:
        x: [N, C, *].
        scale: s, [1, C, 1, ...].
        shift: t, [1, C, 1, ...].
        ends: The lowest and the highest value of y.

    Returns:
        y [N, C, *], mean [C] and variance [C].
    """
    result: tuple[Tensor, Tensor, Tensor] = _NormWithMoments.apply(
        to_float32(x), scale, shift, *ends
    )
    return result


def input_moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance [C] of channels of images [N, C, *], with gradients."""
    result: tuple[Tensor, Tensor] = _Moments.apply(to_float32(images))
    return result
