"""A convolution whose weight is fixed: only its input has a gradient.

    y = conv(x, w, b);   ∂x = conv's transpose of ∂y with w

Autograd keeps x for the gradient of w. Here that has none, so nothing but w is kept: where images
are optimised against a network, half of all feature maps need not be held.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gdfq.functional.windows import per_axis


class _FixedConvolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.like = x.shape, x.stride()
        ctx.settings = stride, padding, dilation, False, [0] * len(stride), groups
        convolution = (F.conv1d, F.conv2d, F.conv3d)[len(stride) - 1]
        return convolution(x, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None, None, None]:
        (grad,), (weight,) = grads, ctx.saved_tensors
        # Read for its shape and layout alone.
        x = grad.new_empty_strided(*ctx.like)
        grad_x, _, _ = torch.ops.aten.convolution_backward(
            grad, x, weight.to(grad.dtype), None, *ctx.settings, (True, False, False)
        )
        return grad_x, None, None, None, None, None, None


def fixed_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Return a convolution of x, with a gradient for x alone.

    Args:
        x: [N, C, *size], of one to three axes.
        weight: [K, C / groups, *kernel]; no gradient.
        bias: [K] or None; no gradient.
        stride: Of each axis, or one for all.
        padding: Zeros at both ends of each axis, or one for all.
        dilation: Of each axis, or one for all.
        groups: Groups of channels that are convolved apart.

    Returns:
        [N, K, *size of the output], of the type that autocast asks for.
    """
    settings = (per_axis(given, weight.ndim - 2) for given in (stride, padding, dilation))
    result: Tensor = _FixedConvolution.apply(x, weight, bias, *settings, groups)
    return result
