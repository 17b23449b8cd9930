"""Fake quantizers: modules that round a tensor to its grid while the student is tuned.

A weight quantizer is called with the layer's weight, an activation quantizer with a feature map
whose range it finds while `observing`. Both give their final grid to `freeze`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from gdfq.execution.precision import to_float32
from gdfq.functional.float_grid import NumberFormat
from gdfq.functional.grid import UNLIMITED, Layout, along_channels, largest_scale


@dataclass(frozen=True)
class QuantizedTensor:
    """Codes in the shape of the tensor, with the scale and zero point of their grid.

    Codes of an integer grid are int8, those of a floating-point grid uint8, with zero points of 0.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    bits: int
    form: NumberFormat | None = None
    """The format of a floating-point grid; None for an integer grid."""


class WeightQuantizer(nn.Module, ABC):
    """Rounds a weight to a grid with one scale and zero point for each output channel.

    Attributes:
        reads_weight: Whether calls read the weight that they get. A quantizer that read it at its
            construction has parameters of its own instead.
    """

    reads_weight: ClassVar[bool] = True

    def __init__(self, bits: int, layout: Layout, groups: int) -> None:
        super().__init__()
        self.bits, self.layout, self.groups = bits, layout, groups

    @abstractmethod
    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight rounded to its grid, with gradients."""

    @abstractmethod
    def quantized(self, weight: Tensor) -> QuantizedTensor:
        """Return the codes of the weight on its final grid."""

    def rescale_(self, factor: Tensor) -> None:
        """Multiply each output channel by its factor [O] > 0; the codes stay.

        Only families with `rescales` implement it.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot be rescaled")

    def fit_(self, weight: Tensor, inputs: Tensor, ridge: Tensor) -> None:
        """Start again from another weight, rounded for the inputs that it gets.

        Only families with `rescales` implement it.

        Args:
            weight: The weight, in the layout `ROWS`.
            inputs: Covariance of the inputs of each group, [G, K, K].
            ridge: λ > 0 of each group, [G] (`gdfq.functional.rounding.rounded_for_outputs`).
        """
        raise NotImplementedError(f"{type(self).__name__} cannot be fitted")

    def rounding_penalty(self, sharpness: float) -> Tensor | None:
        """Return a scalar that is 0 when all rounding is decided; None if none is learned."""
        del sharpness
        return None

    def settle_(self) -> None:
        """Fix learned parameters that are still soft, such as rounding."""

    def along_channels(self, values: Tensor, weight: Tensor) -> Tensor:
        """Return values of the output channels [O], shaped to broadcast against the weight."""
        return along_channels(values, weight, self.layout, self.groups)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, layout={self.layout.value}"


@dataclass(frozen=True)
class QDrop:
    """Leaves a random share of values unquantized (QDrop, arXiv 2203.05740).

    Attributes:
        share: Share of the values, 0..1.
        draw: Randomness of the choice.
    """

    share: float
    draw: torch.Generator

    def __call__(self, through: Tensor, otherwise: Tensor) -> Tensor:
        """Return `through` at random places and `otherwise` elsewhere; both have one shape."""
        chosen = torch.rand(through.shape, generator=self.draw) < self.share
        return torch.where(chosen.to(through.device), through, otherwise)


class ActivationQuantizer(nn.Module, ABC):
    """Rounds an activation to a grid with one scale and zero point, found while `observing`.

    With `dropping` (QDrop) some values stay unquantized.

    Attributes:
        clips_gradient: Whether no gradient passes where values are clipped.
        limits: Lowest and highest value of the tensor, as behind a ReLU6. They round
            to the last codes of the grid, so that its codes saturate where the values do.
        known_range: The range that the grid starts from, where it is known without observing, as
            that of the network's input.
        reach: Factor on the observed range of a learned integer grid, for what was not observed.
        symmetric: Whether the zero point must be 0.
        places: Number of activations of the network that share the grid. Its range is that of all
            of them together; they pass as they are until it is known.
    """

    clips_gradient: ClassVar[bool] = False
    batches: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits, self.observing = bits, False
        self.dropping: QDrop | None = None
        self.limits = UNLIMITED
        self.known_range: tuple[float, float] | None = None
        self.symmetric, self.places, self.reach = False, 1, 1.0
        self._seen: list[list[Tensor]] = []
        self.register_buffer("batches", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        x = to_float32(x)
        if self.observing:
            self.observe_(x.detach())
        if self._seen and not self.batches:
            return x
        quantized = self.fake_quantize(x)
        return quantized if self.dropping is None else self.dropping(x, quantized)

    @torch.no_grad()
    def observe_(self, *parts: Tensor) -> None:
        """Update the range with one batch of one activation, in one part or several."""
        if self.places > 1:
            self._seen.append([_sample(part) for part in parts])
            if len(self._seen) < self.places:
                return
            parts = tuple(part for seen in self._seen for part in seen)
            self._seen = []
        self.batches += 1
        known = self.known_range
        self._update_(parts if known is None else [parts[0].new_tensor(known)])

    @abstractmethod
    def _update_(self, parts: Sequence[Tensor]) -> None:
        """Move the range towards that of a batch, which `batches` counts already."""

    @abstractmethod
    def fake_quantize(self, x: Tensor) -> Tensor:
        """Return x rounded to its grid, with gradients."""

    @abstractmethod
    def grid(self) -> tuple[Tensor, Tensor]:
        """Return scale (> 0) and zero point, both scalars, detached."""

    @property
    def form(self) -> NumberFormat | None:
        """The format of a floating-point grid; None for an integer grid."""
        return None

    def extent(self) -> float:
        """Return the distance from the lowest to the highest value of the grid."""
        scale, form = float(self.grid()[0]), self.form
        return scale * (2**self.bits - 1 if form is None else form.largest - form.lowest)

    def limited(self, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Return the scale, lowered where the grid would leave `limits`; its gradient stays."""
        limits = _farther_limits(self.limits) if self.symmetric else self.limits
        if limits == UNLIMITED:
            return scale
        largest = largest_scale(zero_point, self.bits, limits)
        return torch.where(scale > largest, largest + (scale - scale.detach()), scale)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


_SAMPLE_ELEMENTS = 2**16
"""Elements of a part of an activation that are held until the others of a shared grid pass."""


def _sample(part: Tensor) -> Tensor:
    """Return about _SAMPLE_ELEMENTS elements of a tensor with its minimum and maximum, as [M]."""
    flat = part.flatten()
    stride = len(flat) // _SAMPLE_ELEMENTS | 1  # odd: an even one may visit the same columns
    return torch.cat([flat[::stride], flat.amin()[None], flat.amax()[None]])


def _farther_limits(limits: tuple[float, float]) -> tuple[float, float]:
    """Return the limit that is farther from 0, or both if they are as far, and no other.

    A grid of zero point 0 that ended at the nearer one would not cover the values up to the other.
    """
    low, high = limits
    farther = max(-low, high)
    return (low if -low == farther else -math.inf, high if high == farther else math.inf)
