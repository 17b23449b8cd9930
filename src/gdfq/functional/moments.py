"""Mean and variance of channels, with gradients, at little more than the cost of reading.

The statistics loss needs mean and variance of *every* batch norm's input. Written with
`x.mean()` and `x.var()` they cost as much as the network itself. Here the batch norm (in
evaluation form a scale and shift per channel) and the moments of its input are one operator:

    y = s x + t;   m = E[x];   v = E[(x − m)²]
    ∂x = s ∂y + (2/n) ∂v x + (∂m − 2 ∂v m)/n        n elements a channel

so the backward pass is two fused multiply-adds over the tensor, exact to rounding. A clamp of y
that passes gradients strictly inside its ends, such as a ReLU6, is part of the operator: y itself
is then never saved, because the clamped tensor says where gradients pass.
`benchmarks/speed.py` compares the formulations.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gdfq.execution.precision import to_float32


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of each channel of x [N, C, *], both [C]; no gradients."""
    if x.device.type == "cpu":
        # The moments kernel of the training batch norm: ten times faster than var_mean there.
        channels = x.new_zeros(x.shape[1])
        mean, variance = torch.batch_norm_update_stats(x, channels, channels.clone(), 0.0)
        return mean, variance
    dims = [d for d in range(x.ndim) if d != 1]
    variance, mean = torch.var_mean(x, dims, correction=0)
    return mean, variance


class _NormWithMoments(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, low: float, high: float
    ) -> tuple[Tensor, ...]:
        mean, variance = moments(x)
        y = torch.addcmul(shift, x, scale)
        ctx.ends = (low, high)
        if ctx.ends == UNCLAMPED:
            ctx.save_for_backward(x, scale, mean)
        else:
            F.hardtanh_(y, low, high)
            ctx.save_for_backward(x, scale, mean, y)
        return y, mean, variance

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        grad_y, grad_mean, grad_variance = grads
        x, scale, mean, *clamped = ctx.saved_tensors
        if clamped:
            grad_y = torch.ops.aten.hardtanh_backward(grad_y, *clamped, *ctx.ends)
        n = x.numel() / mean.numel()
        slope = (2 / n) * grad_variance
        offset = grad_mean / n - slope * mean
        grad_x = torch.addcmul(offset.view_as(scale), x, slope.view_as(scale))
        return grad_x.addcmul_(grad_y, scale), None, None, None, None


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
    variance, mean = torch.var_mean(images, [0, *range(2, images.ndim)], correction=0)
    return mean, variance
