"""Images that are optimised in the frequency domain."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from support import networks
from support.narrowing import present
from torch import Tensor

from gdfq.errors import UsageError
from gdfq.execution.context import Context
from gdfq.functional.losses import relative_statistics_loss
from gdfq.graph.capture import Captured, capture
from gdfq.graph.statistics import StatisticsNetwork
from gdfq.optim import AdamConfig
from gdfq.recipes import RECIPES
from gdfq.sources.pool import ImagePool
from gdfq.sources.spectral import (
    SpectralSource,
    from_spectrum,
    limits_of,
    natural_noise,
    natural_spectrum,
)


@pytest.mark.parametrize("size", [[32, 32], [9, 12], [64], [5, 6, 7], [1, 8], [1, 1]])
@pytest.mark.parametrize("channels", [1, 3])
def test_white_coefficients_give_images_of_variance_one(size: list[int], channels: int) -> None:
    """The given share of the variance is that of the image means, or all of it for one pixel."""
    amplitude = natural_spectrum(size, 1.5, 0.3)
    draw = torch.Generator().manual_seed(0)
    white = torch.randn(2000, channels, *amplitude.shape, 2, generator=draw) * math.sqrt(0.5)
    images = from_spectrum(white, amplitude, size, channel_correlation=0.85)
    assert images.shape == (2000, channels, *size)
    assert float(images.square().mean()) == pytest.approx(1, abs=0.1)
    means = images.mean(list(range(2, images.ndim)))
    share = 1 if math.prod(size) == 1 else 0.3
    assert float(means.square().mean()) == pytest.approx(share, rel=0.15)


def test_spectrum_falls_with_the_given_exponent() -> None:
    """NumPy's transform finds 1/f^1.5: the power falls by 4³ from f to 4 f."""
    size = [64, 64]
    amplitude = natural_spectrum(size, 1.5, 0.3)
    draw = torch.Generator().manual_seed(0)
    white = torch.randn(200, 1, *amplitude.shape, 2, generator=draw) * math.sqrt(0.5)
    power = np.abs(np.fft.fft2(from_spectrum(white, amplitude, size, 0.85).numpy())) ** 2
    row = power.mean((0, 1))[0]  # along one axis: frequencies 0, 1, 2, ...
    assert row[4] / row[16] == pytest.approx(4**3, rel=0.3)


def test_channels_have_the_given_correlation() -> None:
    size, channel_correlation = [32, 32], 0.85
    amplitude = natural_spectrum(size, 1.0, 0.3)
    draw = torch.Generator().manual_seed(0)
    white = torch.randn(300, 3, *amplitude.shape, 2, generator=draw) * math.sqrt(0.5)
    images = from_spectrum(white, amplitude, size, channel_correlation)
    correlation = np.corrcoef(images.permute(1, 0, 2, 3).flatten(1).numpy())
    # The differences from the mean sum to zero, so any two of three correlate by −1/2.
    assert correlation[0, 1] == pytest.approx(
        channel_correlation - (1 - channel_correlation) / 2, abs=0.05
    )


@pytest.fixture(scope="module")
def teacher() -> Captured:
    return networks.captured("Residual")


def test_spectral_images_approach_the_statistics(teacher: Captured) -> None:
    source = SpectralSource(batch=32, iterations=60)
    (batch,) = source.stream(teacher, steps=1)
    network = StatisticsNetwork(teacher)

    def error(images: Tensor) -> float:
        return float(relative_statistics_loss(network(images)[1], network.stored))

    start = next(replace(source, iterations=1).stream(teacher, steps=1)).images
    assert error(batch.images) < 0.3 * error(start)
    assert present(batch.labels).bincount(minlength=networks.CLASSES).min() >= 6  # classes in turn
    assert torch.equal(present(batch.teacher_logits), teacher.network(batch.images))
    again = next(source.stream(teacher, steps=1)).images
    other = next(source.stream(teacher, steps=1, context=Context(seed=1))).images
    assert torch.equal(again, batch.images)
    assert not torch.equal(other, batch.images)


def test_spectral_images_have_the_input_scale_and_varied_contrast() -> None:
    """A network of raw pixels gets images of raw pixels."""
    still = AdamConfig(lr=0.0)
    source = SpectralSource(batch=64, iterations=1, optimizer=still, contrast=0.4)
    draw = torch.Generator().manual_seed(0)
    pixels = 120 + 60 * natural_noise(64, (3, 16, 16), source, draw)
    raw = capture(networks.that_saw(pixels), pixels[:2])
    (batch,) = source.stream(raw, steps=1)
    assert float(batch.images.mean()) == pytest.approx(120, abs=6)
    assert float(batch.images.std()) == pytest.approx(60, abs=6)
    moving = SpectralSource(batch=64, contrast=0.4)
    (ready,) = moving.stream(raw, steps=1)
    assert float(ready.images.std()) == pytest.approx(60, abs=3)
    contrasts = batch.images.flatten(1).std(1).log()
    (alike,) = replace(source, contrast=0.0).stream(raw, steps=1)
    plain = alike.images.flatten(1).std(1).log()
    assert 0.3 < float((contrasts.var() - plain.var()).sqrt()) < 0.5
    # However much they differ, they have that deviation together.
    (wild,) = replace(source, contrast=2.0).stream(raw, steps=1)
    assert float(wild.images.std()) == pytest.approx(60, rel=0.2)


def test_drawing_images_leaves_gradients_unchanged(teacher: Captured) -> None:
    with torch.no_grad():
        batches = SpectralSource(batch=4, iterations=2).stream(teacher, steps=1)
        next(batches)
    del batches
    assert torch.is_grad_enabled()


def test_spectral_source_accepts_vectors() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(16, 4), torch.nn.BatchNorm1d(4)).eval()
    vectors = capture(network, torch.randn(2, 16))
    with pytest.raises(UsageError, match="spatial axis"):
        ImagePool(SpectralSource(), images=8, batch=4).stream(vectors, steps=1)  # at once


def test_images_of_quick_are_what_pixels_can_be() -> None:
    teacher = networks.captured("Residual")
    limits = ((-0.5, 0.5), (-1.0, 0.25), (0.0, 1.0))
    source = RECIPES["quick"].source
    (free,) = source.stream(teacher, steps=1)
    (batch,) = source.stream(replace(teacher, input_limits=limits), steps=1)
    lows, highs = free.inputs[0].amin((0, 2, 3)), free.inputs[0].amax((0, 2, 3))
    images = batch.inputs[0]
    for channel, (low, high) in enumerate(limits):
        assert float(lows[channel]) < low
        assert high < float(highs[channel])
        assert float(images[:, channel].amin()) == low
        assert float(images[:, channel].amax()) == high


def test_limits_are_of_each_channel() -> None:
    images = torch.tensor([[[[-3.0, 0.5]], [[-3.0, 9.0]]]])
    teacher = replace(networks.captured("Residual"), input_limits=((-1.0, 1.0), (-2.0, 2.0)))
    limits = limits_of(teacher)
    assert limits is not None
    assert images.clamp(*limits).tolist() == [[[[-1, 0.5]], [[-2, 2]]]]
    assert limits_of(replace(teacher, input_limits=None)) is None
