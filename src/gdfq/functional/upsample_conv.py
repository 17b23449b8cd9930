"""Nearest-neighbour upsampling followed by a 3×3 convolution, as one exact operator.

Each output pixel (2i+a, 2j+b) depends on a 2×2 window of the small input, because neighbours of
the enlarged image repeat. Summing the kernel's taps of the same input pixel gives one 2×2
kernel for each of the four phases (a, b): 4/9 of the multiplications, and the enlarged tensor is
never stored. The generator spends most of its time here.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_PHASES = [(a, b) for a in range(2) for b in range(2)]


def upsampled_convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return conv2d(interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=1).

    Args:
        x: [N, I, H, W].
        weight: [O, I, 3, 3].
        bias: [O].

    Returns:
        [N, O, 2H, 2W].
    """
    result: Tensor = _UpsampledConvolution.apply(x, _phase_kernels(weight), bias)
    return result


def _phase_kernels(weight: Tensor) -> Tensor:
    """[O, I, 3, 3] -> [2, 2, O, I, 2, 2]: the kernels of the phases, sums of the taps."""

    def merged(kernel: Tensor, dim: int) -> Tensor:
        first, second, third = kernel.unbind(dim)
        even = torch.stack([first, second + third], dim)
        odd = torch.stack([first + second, third], dim)
        return torch.stack([even, odd])

    return merged(merged(weight, 2), 4).transpose(0, 1)


class _UpsampledConvolution(torch.autograd.Function):
    """The four phase convolutions, each padded on all sides and cropped to its window.

    Padding and cropping the small output is cheaper than cutting windows out of the input.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernels: Tensor, bias: Tensor) -> Tensor:
        n, _, h, w = x.shape
        x = x.contiguous(memory_format=torch.channels_last)
        ctx.save_for_backward(x, kernels)
        out = x.new_empty((n, h, 2, w, 2, kernels.shape[2]))
        for a, b in _PHASES:
            phase = F.conv2d(x, _channels_last(kernels[a, b]), bias, padding=1)
            out[:, :, a, :, b] = phase[:, :, a : a + h, b : b + w].permute(0, 2, 3, 1)
        return out.view(n, 2 * h, 2 * w, -1).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, kernels = ctx.saved_tensors
        n, _, h, w = x.shape
        grad = grads[0].permute(0, 2, 3, 1).reshape(n, h, 2, w, 2, -1)
        grad_x = torch.zeros_like(x)
        grad_kernels = torch.empty_like(kernels)
        for a, b in _PHASES:
            phase = grad.new_zeros((n, h + 1, w + 1, grad.shape[-1]))
            phase[:, a : a + h, b : b + w] = grad[:, :, a, :, b]
            grad_phase_x, grad_kernels[a, b], _ = torch.ops.aten.convolution_backward(
                phase.permute(0, 3, 1, 2),
                x,
                _channels_last(kernels[a, b]),
                None,
                [1, 1],
                [1, 1],
                [1, 1],
                False,
                [0, 0],
                1,
                [True, True, False],
            )
            grad_x += grad_phase_x
        return grad_x, grad_kernels, grads[0].sum((0, 2, 3))


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)
