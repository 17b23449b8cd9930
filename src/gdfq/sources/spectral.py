"""Images optimised in the frequency domain against the teacher's batch-norm statistics.

An image is the inverse Fourier transform of free coefficients times the amplitude spectrum that
natural images share, 1/f^α. The prior needs no data: it only makes the optimiser take large
steps in low frequencies and small ones in high frequencies. Pixel-wise optimisation does the
reverse, and its images excite the first layers with noise. (Feature visualisation optimises single
images in this way; see C. Olah et al., Distill 2017, "Feature Visualization".)
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from gdfq.errors import UsageError
from gdfq.execution.context import Context
from gdfq.execution.guards import check_images_finite
from gdfq.execution.progress import Step
from gdfq.execution.replay import Replayed
from gdfq.execution.seeding import stream as random_stream
from gdfq.files.plain_values import tagged
from gdfq.functional.losses import focal_loss, relative_statistics_loss
from gdfq.graph.capture import Captured
from gdfq.graph.statistics import StatisticsNetwork
from gdfq.optim import AdamConfig, Cosine, set_rate_
from gdfq.sources.base import Batch, Source, labels_in_turn
from gdfq.sources.input_scale import InputStatistics, estimate_input_statistics
from gdfq.sources.stream import InTurn, Stream


@tagged("SpectralSource", renamed={"dc_power": "brightness", "channel_correlation": "grey"})
@dataclass(frozen=True)
class SpectralSource(Source):
    """Images whose spectra are optimised against the batch-norm statistics of the teacher.

    Each batch follows Adam on `relative_statistics_loss` over all batch norms and the input, whose
    target is `estimate_input_statistics`, plus, for a network with classes, `class_weight` times
    `focal_loss` to labels that cover the classes in turn.

    Attributes:
        batch: Images per batch.
        iterations: Updates of each batch.
        optimizer: Optimizer of the Fourier coefficients.
        exponent: α of the amplitude spectrum 1/f^α at the start.
        dc_power: Share of the power at frequency 0 at the start. It sets how much the means of
            images differ.
        channel_correlation: Share of the power that the channels have in common at the start.
        contrast: Standard deviation of the logarithm of an image's contrast; natural images differ
            in contrast.
        class_weight: Weight of the class loss.
        focus: Exponent γ of the focal class loss.
    """

    batch: int = 128
    iterations: int = 24
    optimizer: AdamConfig = AdamConfig(lr=0.3, betas=(0.5, 0.5))  # noqa: RUF009 (frozen)
    exponent: float = 1.5
    dc_power: float = 0.3
    channel_correlation: float = 0.85
    contrast: float = 0.3
    class_weight: float = 0.01
    focus: float = 2.0

    @property
    def within_limits(self) -> bool:
        """True: images are clipped to the range of pixels."""
        return True

    def stream(
        self,
        teacher: Captured,
        *,
        steps: int,
        context: Context = Context(),
    ) -> Stream:
        """Yield `steps` batches.

        Raises:
            UsageError: The network has no batch norms, or its inputs have no spatial axis.
        """
        if len(teacher.input_shape) < 2:
            raise UsageError(
                "images with a spectrum need one spatial axis or more; this network takes vectors "
                f"of {teacher.input_shape[0]}. Use recipe 'zeroq', or give real inputs (--data, or "
                "data=...)."
            )

        target = self.input_statistics(teacher, context.seed)
        variance = target.deviation.square().expand_as(target.mean)
        of_input = (target.mean, variance)
        network = StatisticsNetwork(teacher, of_input=of_input, memory=context.memory)

        def knowledge(images: Tensor) -> tuple[Any, Tensor, dict[str, Tensor]]:
            with context.autocast(teacher.device):
                outputs, seen = network(images)
            bns = relative_statistics_loss(seen, network.stored)
            return outputs, bns, {"bns": bns.detach()}

        draw = random_stream(context.seed, "spectral.draw")
        return SpectralOptimisation(self, teacher, knowledge, steps, draw, context, target).stream()

    def input_statistics(self, teacher: Captured, seed: int) -> InputStatistics:
        """Return the target statistics of all images, estimated from the teacher."""
        draw = random_stream(seed, "spectral.input")
        noise = natural_noise(_NOISE_IMAGES, teacher.input_shape, self, draw).to(teacher.device)
        return InputStatistics(*estimate_input_statistics(teacher, noise), self.contrast)


_NOISE_IMAGES = 32
"""Noise images from which the input statistics of the network are estimated."""


class SpectralConfig(Protocol):
    """Settings of the spectral optimisation that `SpectralSource` and `PatchSource` share."""

    @property
    def batch(self) -> int: ...
    @property
    def iterations(self) -> int: ...
    @property
    def optimizer(self) -> AdamConfig: ...
    @property
    def exponent(self) -> float: ...
    @property
    def dc_power(self) -> float: ...
    @property
    def channel_correlation(self) -> float: ...
    @property
    def class_weight(self) -> float: ...
    @property
    def focus(self) -> float: ...


Knowledge = Callable[[Tensor], tuple[Any, Tensor, dict[str, Tensor]]]
"""Images -> outputs of the teacher, the loss to minimise, and its parts for the log."""


class _Images:
    """Coefficients [N, C, *spectrum, 2] and contrast [N, C, 1, ...] -> images [N, *input_shape]."""

    def __init__(self, config: SpectralConfig, teacher: Captured, mean: Tensor) -> None:
        _, *self.size = teacher.input_shape
        self.correlation = config.channel_correlation
        amplitude = natural_spectrum(self.size, config.exponent, config.dc_power)
        self.amplitude = amplitude.to(teacher.device)
        self.mean = mean.view(-1, *[1] * len(self.size))
        self.limits = limits_of(teacher)

    def __call__(self, coefficients: Tensor, contrast: Tensor) -> Tensor:
        plain = from_spectrum(coefficients, self.amplitude, self.size, self.correlation)
        images = torch.addcmul(self.mean, plain, contrast)
        return images if self.limits is None else images.clamp(*self.limits)


class _Losses:
    """The loss of coefficients, contrast and labels [N] or None, and its parts for the log."""

    def __init__(self, config: SpectralConfig, images_of: _Images, knowledge: Knowledge) -> None:
        self.config, self.images_of, self.knowledge = config, images_of, knowledge

    def __call__(
        self, coefficients: Tensor, contrast: Tensor, labels: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        outputs, loss, parts = self.knowledge(self.images_of(coefficients, contrast))
        if labels is None:
            return loss, parts
        boundary = focal_loss(outputs, labels, self.config.focus)
        return loss + self.config.class_weight * boundary, {**parts, "boundary": boundary.detach()}


class SpectralOptimisation:
    """Makes batches of images whose Fourier coefficients are optimised with Adam.

    The loss is that of `knowledge` plus, for a network with classes, the focal class loss.

    Args:
        config: Batch size, optimisation and initial spectrum.
        teacher: The trained network.
        knowledge: Returns outputs and loss of the teacher for images [N, *input_shape].
        steps: Total number of batches.
        draw: Randomness of the coefficients.
        context: Context of the run.
        target: Mean and standard deviation that each channel of the images gets.
    """

    def __init__(
        self,
        config: SpectralConfig,
        teacher: Captured,
        knowledge: Knowledge,
        steps: int,
        draw: torch.Generator,
        context: Context,
        target: InputStatistics,
    ) -> None:
        self.config, self.teacher, self.steps, self.target = config, teacher, steps, target
        self.draw, self.listener, self.group = draw, context.listener, context.group
        self.images_of = _Images(config, teacher, target.mean)
        self.losses: dict[str, Tensor] = {}
        self.evaluated = Replayed(_Losses(config, self.images_of, knowledge))

    def stream(self) -> Stream:
        """Return the batches."""
        in_turn = InTurn(self.start, self.optimised, self.steps, self.group, self.teacher.device)
        make = partial(self.batch, in_turn)
        return Stream(make, self.steps, [self.draw], {"images": in_turn})

    def batch(self, in_turn: InTurn[tuple[Tensor, Tensor]], step: int) -> Batch:
        """Return a batch, with the teacher's logits."""
        images = in_turn(step)
        labels = labels_in_turn(self.teacher, step, self.config.batch)
        with torch.no_grad():
            logits = self.teacher.logits(images)
        return Batch((images,), labels, logits, self.losses)

    def start(self) -> tuple[Tensor, Tensor]:
        """Draw the coefficients of a batch, and the relative contrast of its images."""
        channels, *size = self.teacher.input_shape
        shape = self.config.batch, channels, *self.images_of.amplitude.shape, 2
        coefficients = torch.randn(shape, generator=self.draw).mul_(math.sqrt(0.5))
        one_each = self.config.batch, *[1] * (1 + len(size))
        contrast = torch.randn(one_each, generator=self.draw).mul_(self.target.contrast).exp_()
        contrast = contrast.to(self.teacher.device)
        return coefficients.to(self.teacher.device), contrast / contrast.square().mean().sqrt()

    def optimised(self, step: int, start: tuple[Tensor, Tensor]) -> Tensor:
        """Return the images of a batch."""
        config, total = self.config, self.steps * self.config.iterations
        labels = labels_in_turn(self.teacher, step, config.batch)
        coefficients, contrast = start[0].requires_grad_(), self.target.deviation * start[1]
        optimizer = config.optimizer.build([coefficients])
        for iteration in range(config.iterations):
            set_rate_(optimizer, Cosine().factor(iteration, config.iterations))
            with torch.enable_grad():
                loss, self.losses = self.evaluated(coefficients, contrast, labels)
                check_images_finite({"total": loss.detach(), **self.losses}, step, iteration)
                (coefficients.grad,) = torch.autograd.grad(loss, coefficients)
            optimizer.step()
            done = step * config.iterations + iteration + 1
            self.listener(Step("images", done, total, self.losses))
        if step == self.steps - 1:
            self.evaluated.forget()
        with torch.no_grad():
            return self.images_of(coefficients, contrast)


def limits_of(teacher: Captured) -> tuple[Tensor, Tensor] | None:
    """Return the lowest and highest value of each channel [C, 1, ...]; None if not known."""
    if teacher.input_limits is None:
        return None
    low, high = torch.tensor(teacher.input_limits, device=teacher.device).T
    shape = (-1, *[1] * (len(teacher.input_shape) - 1))
    return low.view(shape), high.view(shape)


def natural_noise(
    count: int, shape: Sequence[int], config: SpectralConfig, draw: torch.Generator
) -> Tensor:
    """What optimisation starts from: noise [count, *shape] with the spectrum of natural images.

    Inputs without dimensions to have a spectrum in are white.
    """
    channels, *size = shape
    if not size:
        return torch.randn(count, channels, generator=draw)
    amplitude = natural_spectrum(size, config.exponent, config.dc_power)
    noise = torch.randn(count, channels, *amplitude.shape, 2, generator=draw).mul_(math.sqrt(0.5))
    return from_spectrum(noise, amplitude, size, config.channel_correlation)


def natural_spectrum(size: list[int], exponent: float, dc_power: float) -> Tensor:
    """Return the amplitude spectrum 1/f^exponent that natural images share.

    It is scaled so that unit complex normal coefficients make images of variance 1.

    Args:
        size: Sides of the images.
        exponent: α of the spectrum.
        dc_power: Share of the variance that is at f = 0, between the means of images.

    Returns:
        Amplitudes on the grid of `torch.fft.rfftn` over `size`: [*size[:-1], size[-1] // 2 + 1].
    """
    axes = [torch.fft.fftfreq(side) for side in size[:-1]] + [torch.fft.rfftfreq(size[-1])]
    grid = torch.meshgrid(*axes, indexing="ij")
    frequency = torch.stack(grid).square().sum(0).sqrt()
    # A coefficient of unit power adds 2 |c|² with its mirror image; of the first column (and, for
    # an even side, the last), whose mirror it is itself, only the real half remains.
    count = torch.full((size[-1] // 2 + 1,), 2.0)
    count[0] = 0.5
    if size[-1] % 2 == 0:
        count[-1] = 0.5
    pixels, mean = math.prod(size), frequency == 0
    amplitude = torch.where(mean, 0.0, frequency.pow(-exponent))
    power = (count * amplitude.square()).sum()
    if power == 0:  # of one pixel, all is in the mean
        power, dc_power = torch.ones(()), 1.0
    amplitude *= ((1 - dc_power) * pixels / power).sqrt()
    return amplitude.masked_fill(mean, math.sqrt(dc_power * pixels / 0.5))


def from_spectrum(
    coefficients: Tensor, amplitude: Tensor, size: list[int], channel_correlation: float
) -> Tensor:
    """Return the images of Fourier coefficients, with gradients.

    The channels' mean is scaled so that of white coefficients it makes the share
    `channel_correlation` of the power, as in natural images, whose channels are mostly alike; the
    differences between channels make the rest.

    Args:
        coefficients: Real and imaginary parts, [N, C, *amplitude.shape, 2].
        amplitude: Amplitude spectrum (see `natural_spectrum`).
        size: Sides of the images.
        channel_correlation: Share of the power that the channels have in common.

    Returns:
        Images [N, C, *size], channels_last where they have two sides.
    """
    channels = coefficients.shape[1]
    mean = coefficients.mean(1, keepdim=True)
    if channels > 1:
        apart = math.sqrt(channels / (channels - 1) * (1 - channel_correlation))
        coefficients = math.sqrt(channels * channel_correlation) * mean + apart * (
            coefficients - mean
        )
    scaled = torch.view_as_complex(coefficients) * amplitude
    dims = list(range(-len(size), 0))
    images: Tensor = torch.fft.irfftn(scaled, s=size, dim=dims, norm="ortho")
    layout = torch.channels_last if images.ndim == 4 else torch.contiguous_format
    return images.contiguous(memory_format=layout)
