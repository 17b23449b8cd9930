"""Weights whose rounding is learned: up or down, never further (AdaRound, arXiv 2004.10568)."""

import torch
from torch import Tensor, nn

from gdfq.functional.grid import Layout, code_bounds
from gdfq.quantizers.base import QuantizedTensor, WeightQuantizer
from gdfq.quantizers.lsq import best_weight_grid

_STRETCH = (-0.1, 1.1)
"""The sigmoid is stretched to this interval and clipped to 0..1, so that it reaches both ends."""


class RoundedWeight(WeightQuantizer):
    """w_q = Δ (clamp(b + h(v) + z) − z) with base b = ⌊w/Δ⌋ fixed; rounding h(v) and Δ are learned.

    h is the rectified sigmoid of AdaRound; it starts at the weight's own fraction, so that w_q
    starts at the weight itself. Scale and rounding are learned together (GENIE, arXiv 2212.04780).
    h is soft until `settle_`, and 0 or 1 afterwards. The weight is read once, at construction.
    """

    reads_weight = False
    scale: Tensor
    zero_point: Tensor
    base: Tensor

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
        weight = weight.detach()
        scale, zero_point = best_weight_grid(weight, bits, layout, groups, symmetric=symmetric)
        scaled = weight / scale
        base = scaled.floor()
        low, high = _STRETCH
        share = ((scaled - base - low) / (high - low)).clamp(1e-4, 1 - 1e-4)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)
        self.register_buffer("base", base)
        self.rounding_logits = nn.Parameter((share / (1 - share)).log())
        self.log_scale = nn.Parameter(torch.zeros_like(scale))
        self.settled = False

    def rounding(self) -> Tensor:
        """Return h(v), each in 0..1."""
        low, high = _STRETCH
        soft = (self.rounding_logits.sigmoid() * (high - low) + low).clamp(0, 1)
        return (soft >= 0.5).to(soft.dtype) if self.settled else soft

    def settle_(self) -> None:
        """Round each weight up or down from now on."""
        self.settled = True

    def rounding_penalty(self, sharpness: float) -> Tensor:
        """Return Σ 1 − |2h − 1|^β, a scalar: 0 when all rounding is decided."""
        return (1 - (2 * self.rounding() - 1).abs().pow(sharpness)).sum()

    def forward(self, weight: Tensor) -> Tensor:  # noqa: ARG002 (it was read at construction)
        codes = (self.base + self.rounding() + self.zero_point).clamp(*code_bounds(self.bits))
        return (codes - self.zero_point) * (self.scale * self.log_scale.exp())

    @torch.no_grad()
    def quantized(self, weight: Tensor) -> QuantizedTensor:  # noqa: ARG002
        up = (self.rounding() >= 0.5).to(self.base.dtype)
        codes = (self.base + up + self.zero_point).clamp(*code_bounds(self.bits))
        scale = self.scale * self.log_scale.exp()
        return QuantizedTensor(codes.to(torch.int8), scale, self.zero_point, self.bits)
