"""The quantizers of GDFQ: minimum and maximum set the grid (Q1-Q3, `docs/equations.md`)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gdfq.functional.grid import (
    Layout,
    channel_range,
    quantize,
    range_grid,
    straight_through,
    weight_grid,
)
from gdfq.quantizers.base import ActivationQuantizer, QuantizedTensor, WeightQuantizer


class MinMaxWeight(WeightQuantizer):
    """Per-output-channel grid over the minimum and maximum of the *current* weights (Q1, Q2).

    At 8 bits the grid is symmetric (see `grid.weight_grid`); the paper's is not.
    """

    def __init__(self, bits: int, layout: Layout, groups: int, *, symmetric: bool = False) -> None:
        super().__init__(bits, layout, groups)
        self.symmetric = symmetric

    def grid(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return scale and zero point, shaped to broadcast against the weight."""
        low, high = channel_range(weight.detach(), self.layout, self.groups)
        return weight_grid(low, high, self.bits, symmetric=self.symmetric)

    def forward(self, weight: Tensor) -> Tensor:
        return straight_through(weight, *self.grid(weight), self.bits)

    @torch.no_grad()
    def quantized(self, weight: Tensor) -> QuantizedTensor:
        scale, zero_point = self.grid(weight)
        codes = quantize(weight, scale, zero_point, self.bits).to(torch.int8)
        return QuantizedTensor(codes, scale, zero_point, self.bits)


class MovingRange(ActivationQuantizer):
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

    def __init__(self, bits: int, momentum: float = 0.9) -> None:
        super().__init__(bits)
        self.momentum = momentum
        for name in ("low", "high", "scale", "zero_point"):
            self.register_buffer(name, torch.zeros(()))

    def fake_quantize(self, x: Tensor) -> Tensor:
        return straight_through(x, self.scale, self.zero_point, self.bits)

    def _update_(self, parts: Sequence[Tensor]) -> None:
        low = torch.stack([part.amin() for part in parts]).amin()
        high = torch.stack([part.amax() for part in parts]).amax()
        self.low.lerp_(low.clamp_(max=0), 1 - self.momentum)
        self.high.lerp_(high.clamp_(min=0), 1 - self.momentum)
        correction = 1 - self.momentum**self.batches
        scale, zero_point = range_grid(
            self.low / correction, self.high / correction, self.bits, symmetric=self.symmetric
        )
        self.scale.copy_(self.limited(scale, zero_point))
        self.zero_point.copy_(zero_point)

    def grid(self) -> tuple[Tensor, Tensor]:
        return self.scale, self.zero_point
