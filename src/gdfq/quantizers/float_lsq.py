"""Quantizers with floating-point grids whose scales are learned (LSQ, arXiv 1902.08153).

Format and scale start at those of least square error, which a search finds; then the scale is
trained as that of an integer grid (`gdfq.quantizers.lsq`).
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from gdfq.functional.float_grid import (
    NumberFormat,
    best_format,
    best_scale,
    encode,
    nearest,
)
from gdfq.functional.grid import Layout, channel_range, code_bounds
from gdfq.functional.rounding import rounded_for_outputs
from gdfq.quantizers.base import ActivationQuantizer, QuantizedTensor, WeightQuantizer
from gdfq.quantizers.lsq import channel_sum, learned_float_scale, sample_of_parts

_BEYOND = 1.01
"""Where latent numbers beyond the largest number of a format stay, in units of it."""
_KNOWN_RANGE_SAMPLE = 2**12
"""Evenly spread values that stand for a range of which nothing else is known."""


def best_weight_format(
    weight: Tensor, forms: Sequence[NumberFormat], layout: Layout, groups: int = 1
) -> tuple[NumberFormat, Tensor]:
    """Return the format of a weight, and the scale of each output channel, of least square error.

    Args:
        weight: The weight, with output channels as `layout` says.
        forms: The formats to choose from.
        layout: Which dimension holds the output channels.
        groups: Groups of a convolution.

    Returns:
        The format, and scales that broadcast against the weight.
    """
    low, high = channel_range(weight, layout, groups)
    total = partial(channel_sum, layout=layout, groups=groups)
    return best_format(weight, torch.maximum(low.abs(), high.abs()), forms, total)


class FloatWeight(WeightQuantizer):
    """w_q = Δ F(v / c) with latent codes v and the scale Δ of each output channel learned.

    F rounds to the format. c is the largest integer code of as many bits divided by the largest
    number of the format, so that a learning rate in codes means the same as with integer grids.
    ∂F(u)/∂u is taken as 1, and 0 where u is clipped. The weight is read once, at construction.
    """

    reads_weight = False
    scale: Tensor
    chosen: Tensor

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
        self.forms = tuple(forms)
        weight = weight.detach()
        form, scale = best_weight_format(weight, forms, layout, groups)
        self.register_buffer("scale", scale)
        self.register_buffer("chosen", torch.tensor(self.forms.index(form)))
        self.codes = nn.Parameter(_inside(weight / scale, form) * self._codes_per_unit())
        self.log_scale = nn.Parameter(torch.zeros_like(scale))

    @property
    def form(self) -> NumberFormat:
        """The format that was chosen."""
        return self.forms[int(self.chosen)]

    def _codes_per_unit(self) -> float:
        return code_bounds(self.bits)[1] / self.form.largest

    def forward(self, weight: Tensor) -> Tensor:  # noqa: ARG002 (it was read at construction)
        form = self.form
        inside = (self.codes / self._codes_per_unit()).clamp(form.lowest, form.largest)
        rounded = inside + (nearest(inside.detach(), form) - inside).detach()
        return rounded * (self.scale * self.log_scale.exp())

    @torch.no_grad()
    def rescale_(self, factor: Tensor) -> None:
        """Multiply each output channel by its factor [O] > 0; the codes stay."""
        self.scale.mul_(self.along_channels(factor, self.codes))

    @torch.no_grad()
    def fit_(self, weight: Tensor, inputs: Tensor, ridge: Tensor) -> None:
        form, scale = best_weight_format(weight, self.forms, self.layout, self.groups)
        rows, steps = (
            part.to(inputs.dtype).reshape(len(inputs), -1, columns)
            for part, columns in ((weight, inputs.shape[-1]), (scale, 1))
        )
        latent, steps = rounded_for_outputs(
            rows, inputs, ridge, steps, lambda units: nearest(units, form), self.bits
        )
        self.scale.copy_(steps.view_as(scale))
        self.log_scale.zero_()
        self.chosen.fill_(self.forms.index(form))
        latent = _inside(latent.view_as(weight).to(weight.dtype), form)
        self.codes.copy_(latent * self._codes_per_unit())

    @torch.no_grad()
    def quantized(self, weight: Tensor) -> QuantizedTensor:  # noqa: ARG002
        form = self.form
        codes = encode(nearest(self.codes / self._codes_per_unit(), form), form)
        scale = self.scale * self.log_scale.exp()
        return QuantizedTensor(codes, scale, torch.zeros_like(scale), self.bits, form)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, form={self.form}"


class FloatRange(ActivationQuantizer):
    """Floating-point grid of an activation, with the format and scale of least square error.

    Unsigned formats are for activations whose `limits` say that they are never negative. Over
    several batches the starting scale is the mean of theirs, and the format that of the first. A
    known range counts as evenly filled.
    """

    clips_gradient = True
    scale: Tensor
    chosen: Tensor

    def __init__(self, bits: int, *, forms: Sequence[NumberFormat]) -> None:
        super().__init__(bits)
        self.forms = tuple(forms)
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("chosen", torch.tensor(0))
        self.log_scale = nn.Parameter(torch.zeros(()))

    @property
    def form(self) -> NumberFormat:
        """The format that was chosen."""
        return self.forms[int(self.chosen)]

    def fake_quantize(self, x: Tensor) -> Tensor:
        return learned_float_scale(x, self._learned(), self.form)

    def _learned(self) -> Tensor:
        return self.scale * self.log_scale.exp()

    def _update_(self, parts: Sequence[Tensor]) -> None:
        if self.known_range is not None:
            share = torch.linspace(0, 1, _KNOWN_RANGE_SAMPLE, device=parts[0].device)
            parts = [torch.lerp(parts[0].amin(), parts[0].amax(), share)]
        sample, low, high = sample_of_parts(parts)
        reach = torch.maximum(low.abs(), high.abs())
        if self.batches == 1:
            may_be_negative = self.limits[0] < 0
            forms = [form for form in self.forms if form.signed >= may_be_negative]
            form, scale = best_format(sample, reach, forms, torch.sum)
            self.chosen.fill_(self.forms.index(form))
            self.scale.copy_(scale)
        else:
            scale, _ = best_scale(sample, reach, self.form, torch.sum)
            self.scale.lerp_(scale, 1 / float(self.batches))

    @torch.no_grad()
    def grid(self) -> tuple[Tensor, Tensor]:
        return self._learned(), torch.zeros_like(self.scale)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, form={self.form}"


def _inside(latent: Tensor, form: NumberFormat) -> Tensor:
    """Return latent numbers of which those beyond the ends of a format stay clipped."""
    return latent.clamp(_BEYOND * form.lowest, _BEYOND * form.largest)
