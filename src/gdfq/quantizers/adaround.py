"""Weights whose rounding is learned: up or down, never further (AdaRound, arXiv 2004.10568)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gdfq.functional.float_grid import NumberFormat, encode, neighbours
from gdfq.functional.grid import Layout, code_bounds
from gdfq.quantizers.base import QuantizedTensor, WeightQuantizer
from gdfq.quantizers.float_lsq import best_weight_format
from gdfq.quantizers.lsq import best_weight_grid

_STRETCH = (-0.1, 1.1)
"""The sigmoid is stretched to this interval and clipped to 0..1, so that it reaches both ends."""


class LearnedRounding(WeightQuantizer):
    """Rounds each weight up or down by h(v) in 0..1, the rectified sigmoid of AdaRound.

    h is soft until `settle_`, and 0 or 1 afterwards. Scale and rounding are learned together
    (GENIE, arXiv 2212.04780). The weight is read once, at construction.
    """

    reads_weight = False
    scale: Tensor
    base: Tensor

    def __init__(self, bits: int, layout: Layout, groups: int) -> None:
        super().__init__(bits, layout, groups)
        self.settled = False

    def _learn(self, fraction: Tensor) -> None:
        """Make the parameters: h starts at the weights' fractions, so that w_q starts at w."""
        low, high = _STRETCH
        share = ((fraction - low) / (high - low)).clamp(1e-4, 1 - 1e-4)
        self.rounding_logits = nn.Parameter((share / (1 - share)).log())
        self.log_scale = nn.Parameter(torch.zeros_like(self.scale))

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

    def _up(self) -> Tensor:
        """Return 1 where a weight is rounded up, else 0."""
        return (self.rounding() >= 0.5).to(self.base.dtype)


class RoundedWeight(LearnedRounding):
    """w_q = Δ (clamp(b + h(v) + z) − z) with the base b = ⌊w/Δ⌋ fixed; h(v) and Δ are learned."""

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
        weight = weight.detach()
        scale, zero_point = best_weight_grid(weight, bits, layout, groups, symmetric=symmetric)
        scaled = weight / scale
        base = scaled.floor()
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)
        self.register_buffer("base", base)
        self._learn(scaled - base)

    def forward(self, weight: Tensor) -> Tensor:  # noqa: ARG002 (it was read at construction)
        codes = (self.base + self.rounding() + self.zero_point).clamp(*code_bounds(self.bits))
        return (codes - self.zero_point) * (self.scale * self.log_scale.exp())

    @torch.no_grad()
    def quantized(self, weight: Tensor) -> QuantizedTensor:  # noqa: ARG002
        codes = (self.base + self._up() + self.zero_point).clamp(*code_bounds(self.bits))
        scale = self.scale * self.log_scale.exp()
        return QuantizedTensor(codes.to(torch.int8), scale, self.zero_point, self.bits)


class RoundedFloatWeight(LearnedRounding):
    """w_q = Δ (b + h(v) g) on a floating-point grid; rounding h(v) and Δ are learned.

    The base b is the number of the format below w/Δ, and g the distance to the next one (arXiv
    2408.06995). Beyond the ends of the grid g is 0.
    """

    gap: Tensor

    def __init__(
        self,
        weight: Tensor,
        bits: int,
        layout: Layout,
        groups: int = 1,
        *,
        forms: Sequence[NumberFormat],
    ) -> None:
        super().__init__(bits, layout, groups)
        weight = weight.detach()
        self.form, scale = best_weight_format(weight, forms, layout, groups)
        scaled = weight / scale
        base, above = neighbours(scaled, self.form)
        gap = above - base
        self.register_buffer("scale", scale)
        self.register_buffer("base", base)
        self.register_buffer("gap", gap)
        self._learn(torch.where(gap > 0, (scaled - base) / gap, 0.0))

    def forward(self, weight: Tensor) -> Tensor:  # noqa: ARG002 (it was read at construction)
        return (self.base + self.rounding() * self.gap) * (self.scale * self.log_scale.exp())

    @torch.no_grad()
    def quantized(self, weight: Tensor) -> QuantizedTensor:  # noqa: ARG002
        codes = encode(self.base + self._up() * self.gap, self.form)
        scale = self.scale * self.log_scale.exp()
        return QuantizedTensor(codes, scale, torch.zeros_like(scale), self.bits, self.form)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, form={self.form}"
