"""Fake quantizers: modules that put a tensor on its grid while the student is tuned.

A weight quantizer is called with the weight at every forward; an activation quantizer keeps a
range that it tracks while `observing`. Both give their final grid to `freeze`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gdfq.grid import (
    Layout,
    affine_grid,
    along_channels,
    channel_range,
    quantize,
    straight_through,
)


@dataclass(frozen=True)
class QuantizedTensor:
    """Integer codes (int8, shape of the tensor) with the scale and zero point of their grid."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    bits: int


class MinMaxWeight(nn.Module):
    """Per-output-channel grid over the minimum and maximum of the *current* weights (Q1, Q2)."""

    def __init__(self, bits: int, layout: Layout, groups: int = 1) -> None:
        super().__init__()
        self.bits, self.layout, self.groups = bits, layout, groups

    def grid(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point, shaped to broadcast against the weight."""
        low, high = channel_range(weight.detach(), self.layout, self.groups)
        return affine_grid(low, high, self.bits)

    def forward(self, weight: Tensor) -> Tensor:
        return straight_through(weight, *self.grid(weight), self.bits)

    def along_channels(self, values: Tensor, weight: Tensor) -> Tensor:
        """Values of each output channel [O], shaped to broadcast against the weight."""
        return along_channels(values, weight, self.layout, self.groups)

    @torch.no_grad()
    def quantized(self, weight: Tensor) -> QuantizedTensor:
        """The weight's codes on its final grid."""
        scale, zero_point = self.grid(weight)
        codes = quantize(weight, scale, zero_point, self.bits).to(torch.int8)
        return QuantizedTensor(codes, scale, zero_point, self.bits)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, layout={self.layout.value}"


class MovingRange(nn.Module):
    """Per-tensor grid over a moving average of each batch's minimum and maximum (Q1-Q3).

    While `observing`, with r_t the batch's minimum (maximum) and momentum μ = 0.9:

        m_t = μ m_{t−1} + (1 − μ) r_t,  m_0 = 0;   tracked = m_t / (1 − μ^t)        (Q3)

    so a constant range is tracked exactly from the first batch on. The range always contains 0,
    because padding and ReLU need it. Afterwards it is frozen.
    """

    low: Tensor
    high: Tensor
    scale: Tensor
    zero_point: Tensor
    batches: Tensor

    def __init__(self, bits: int, momentum: float = 0.9) -> None:
        super().__init__()
        self.bits, self.momentum = bits, momentum
        self.observing = False
        for name in ("low", "high", "scale", "zero_point", "batches"):
            self.register_buffer(name, torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.observing:
            self.observe_(x.detach())
        return straight_through(x, self.scale, self.zero_point, self.bits)

    def observe_(self, x: Tensor) -> None:
        """Take one batch into the moving average."""
        self.batches += 1
        self.low.lerp_(x.amin().clamp_(max=0), 1 - self.momentum)
        self.high.lerp_(x.amax().clamp_(min=0), 1 - self.momentum)
        correction = 1 - self.momentum**self.batches
        scale, zero_point = affine_grid(self.low / correction, self.high / correction, self.bits)
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"
