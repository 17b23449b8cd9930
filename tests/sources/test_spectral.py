"""Images in the frequency domain, and the pool that hands them out."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import networks

from gdfq.data.datasets import ArrayData
from gdfq.data.preprocessing import Preprocessing
from gdfq.errors import UsageError
from gdfq.execution.context import Context
from gdfq.functional.losses import relative_statistics_loss
from gdfq.graph.capture import capture
from gdfq.graph.statistics import StatisticsNetwork
from gdfq.optim import AdamConfig
from gdfq.recipes import QUICK
from gdfq.sources.augment import prediction_consistency, shifted_and_flipped
from gdfq.sources.base import Batch, Source
from gdfq.sources.given import on_images
from gdfq.sources.pool import ImagePool, collect
from gdfq.sources.spectral import (
    SpectralSource,
    from_spectrum,
    natural_noise,
    natural_spectrum,
)


@pytest.mark.parametrize("size", [[32, 32], [9, 12], [64], [5, 6, 7], [1, 8], [1, 1]])
@pytest.mark.parametrize("channels", [1, 3])
def test_white_coefficients_make_images_of_variance_one(size, channels):
    """So much of it as asked is that of the images' means, or all, if there is one pixel."""
    amplitude = natural_spectrum(size, 1.5, 0.3)
    draw = torch.Generator().manual_seed(0)
    white = torch.randn(2000, channels, *amplitude.shape, 2, generator=draw) * math.sqrt(0.5)
    images = from_spectrum(white, amplitude, size, channel_correlation=0.85)
    assert images.shape == (2000, channels, *size)
    assert float(images.square().mean()) == pytest.approx(1, abs=0.1)
    means = images.mean(list(range(2, images.ndim)))
    share = 1 if math.prod(size) == 1 else 0.3
    assert float(means.square().mean()) == pytest.approx(share, rel=0.15)


def test_the_spectrum_falls_as_asked():
    """NumPy's own transform sees 1/f^1.5 in the images: power falls by 4³ from f to 4 f."""
    size = [64, 64]
    amplitude = natural_spectrum(size, 1.5, 0.3)
    draw = torch.Generator().manual_seed(0)
    white = torch.randn(200, 1, *amplitude.shape, 2, generator=draw) * math.sqrt(0.5)
    power = np.abs(np.fft.fft2(from_spectrum(white, amplitude, size, 0.85).numpy())) ** 2
    row = power.mean((0, 1))[0]  # along one axis: frequencies 0, 1, 2, ...
    assert row[4] / row[16] == pytest.approx(4**3, rel=0.3)


def test_channels_are_as_alike_as_asked():
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
def teacher():
    return networks.captured("Residual")


def test_the_images_come_near_the_statistics(teacher):
    source = SpectralSource(batch=32, iterations=60)
    (batch,) = source.stream(teacher, steps=1)
    network = StatisticsNetwork(teacher)

    def error(images):
        return float(relative_statistics_loss(network(images)[1], network.stored))

    start = next(replace(source, iterations=1).stream(teacher, steps=1)).images
    assert error(batch.images) < 0.3 * error(start)
    assert batch.labels.bincount(minlength=networks.CLASSES).min() >= 6  # classes in turn
    assert torch.equal(batch.teacher_logits, teacher.network(batch.images))
    again = next(source.stream(teacher, steps=1)).images
    other = next(source.stream(teacher, steps=1, context=Context(seed=1))).images
    assert torch.equal(again, batch.images)
    assert not torch.equal(other, batch.images)


def test_images_have_the_networks_own_scale_and_contrasts_of_their_own():
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


def test_drawing_images_leaves_gradients_as_they_were(teacher):
    with torch.no_grad():
        batches = SpectralSource(batch=4, iterations=2).stream(teacher, steps=1)
        next(batches)
    del batches
    assert torch.is_grad_enabled()


def test_vectors_have_no_spectrum():
    network = torch.nn.Sequential(torch.nn.Linear(16, 4), torch.nn.BatchNorm1d(4)).eval()
    vectors = capture(network, torch.randn(2, 16))
    with pytest.raises(UsageError, match="spatial axis"):
        ImagePool(SpectralSource(), images=8, batch=4).stream(vectors, steps=1)  # at once


@dataclass(frozen=True)
class Counted(Source):
    """Images that say which they are, as a source."""

    batch: int = 4

    def stream(self, teacher, *, steps, **_):
        for step in range(steps):
            number = torch.arange(float(self.batch)) + self.batch * step
            images = number.view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
            yield Batch((images,), number.long(), None)


def test_a_pool_shows_each_image_once_an_epoch(teacher):
    pool = ImagePool(Counted(), images=10, batch=5)
    batches = list(pool.stream(teacher, steps=4, context=Context(seed=3)))
    for first, second in (batches[:2], batches[2:]):
        labels = torch.cat([first.labels, second.labels])
        assert labels.sort().values.tolist() == list(range(10))
        values = torch.cat([first.images, second.images])[:, 0, 0, 0]
        assert torch.equal(values.long(), labels)  # image and label stay together
    assert not torch.equal(batches[0].labels, batches[2].labels)
    same = list(pool.stream(teacher, steps=4, context=Context(seed=3)))
    assert all(torch.equal(a.images, b.images) for a, b in zip(batches, same, strict=True))


@dataclass(frozen=True)
class Textures(Source):
    """Images of noise, as a source."""

    batch: int = 8

    def stream(self, teacher, *, steps, **_):
        for step in range(steps):
            yield Batch((networks.images(8, seed=step),), torch.zeros(8, dtype=torch.long), None)


class Brightest(torch.nn.Module):
    """Tells where an image is brightest, or what its brightest channel is."""

    def __init__(self, where: bool) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm2d(3)
        self.where = where

    def forward(self, x):
        x = self.norm(x)
        return x.sum(1).flatten(1) if self.where else x.amax((2, 3))


@pytest.mark.parametrize("where", [True, False])
def test_a_pool_moves_images_that_the_teacher_knows_again(where):
    teacher = capture(Brightest(where).eval(), networks.images(2))
    images, _ = collect(Textures(), teacher, 32)
    known = float(prediction_consistency(teacher, images, torch.Generator().manual_seed(0)))
    assert known < 0.2 if where else known > 0.8
    pool = ImagePool(Textures(), images=32, batch=8)
    drawn = [batch.images for batch in pool.stream(teacher, steps=12)]
    as_made = [
        all(any(torch.equal(image, made) for made in images) for image in batch) for batch in drawn
    ]
    assert all(as_made) if where else sum(as_made) < 6
    never = replace(pool, augmented=False)
    assert (
        all(
            torch.equal(a, b.images)
            for a, b in zip(drawn, never.stream(teacher, steps=12), strict=True)
        )
        == where
    )


def test_the_teacher_is_asked_about_images_from_all_over_the_pool():
    teacher = capture(Brightest(where=True).eval(), networks.images(2))
    even = torch.zeros(512, *teacher.input_shape)  # nowhere brighter, wherever it is moved
    images = torch.cat([even, networks.images(512)])
    known = float(prediction_consistency(teacher, images, torch.Generator().manual_seed(0)))
    assert 0.5 <= known < 0.6


def test_a_pool_moves_images_for_a_network_without_classes():
    shape = networks.shape_of("Volume")
    teacher = capture(networks.make("Volume"), networks.images(2, shape=shape))
    assert prediction_consistency(teacher, networks.images(4, shape=shape), torch.Generator()) == 1


@pytest.mark.parametrize(
    ("shape", "images", "batch", "at_once"),
    [  # room for 50, 25, 12 and not even one image
        ((3, 8, 8), 40, 10, 1),
        ((3, 8, 16), 25, 8, 1),
        ((3, 16, 16), 12, 4, 1),
        ((3, 99, 99), 1, 1, 1),
    ],
)
def test_a_pool_has_fewer_images_and_smaller_batches_when_they_are_large(
    shape, images, batch, at_once
):
    pool = ImagePool(Counted(), images=40, batch=10, pixels=3200)
    fitted = pool.fitted(shape)
    assert (fitted.images, fitted.batch, fitted.source.batch) == (images, batch, at_once)
    assert replace(pool, batch=1).fitted(shape).batch == 1
    same = replace(pool, pixels=None)
    assert same.fitted(shape) == same
    assert pool.fitted(shape).fitted(shape) == pool.fitted(shape)


@pytest.mark.parametrize(("side", "at_once"), [(32, 128), (128, 128), (129, 64), (224, 32)])
def test_a_recipe_makes_fewer_large_images_together(side, at_once):
    fitted = QUICK.fitted((3, side, side)).source
    assert (fitted.images, fitted.batch, fitted.source.batch) == (256, 100, at_once)


def test_a_pool_makes_as_many_as_fit(teacher):
    pool = ImagePool(Counted(), images=10, batch=4, pixels=8 * 8 * 9)
    stream = pool.stream(teacher, steps=1)
    assert len(stream.images()) == 9
    assert len(next(stream).images) == 4
    _, images = pool.made(teacher)
    assert len(images) == 9


def test_collect_takes_the_first(teacher):
    images, labels = collect(Counted(), teacher, 6)
    assert labels.tolist() == [0, 1, 2, 3, 4, 5]
    assert images.shape == (6, 3, 8, 8)


@settings(max_examples=30)
@given(seed=st.integers(0, 2**31), size=st.sampled_from([[16, 24], [40], [7, 7], [8, 8, 8]]))
def test_shifting_moves_and_mirrors_only(seed, size):
    images = torch.rand(3, 2, *size, generator=torch.Generator().manual_seed(seed))
    moved = shifted_and_flipped(images, torch.Generator().manual_seed(seed))
    assert moved.shape == images.shape
    # Every value comes from the same image and channel, and the middle survives.
    for before, after in zip(images.flatten(0, 1), moved.flatten(0, 1), strict=True):
        assert bool(torch.isin(after, before).all())
        middle = before[tuple(slice(side // 4, side - side // 4) for side in size)]
        assert bool(torch.isin(middle, after).all())


def test_given_images_fill_the_pool():
    images = torch.randint(256, (7, 1, 8, 8)).byte()
    data = ArrayData(images, torch.arange(7))
    pool = on_images(ImagePool(Counted(), images=10, batch=5), data, Preprocessing((0.0,), (1.0,)))
    assert pool.images == 7
    assert pool.source.data is data
