"""Measures of images."""

import math

import pytest
import torch
from support import networks

from gdfq.analysis import images
from gdfq.data.preprocessing import Preprocessing
from gdfq.execution.budget import MemoryBudget
from gdfq.functional.losses import relative_statistics_loss
from gdfq.graph.capture import Captured, capture
from gdfq.graph.memory import forward_bytes
from gdfq.graph.statistics import StatisticsNetwork
from gdfq.sources.noise import noise_like_inputs
from gdfq.sources.spectral import SpectralSource, natural_noise

UNIT = Preprocessing((0.0,), (1.0,))


def test_spread_is_one_for_unrelated_and_zero_for_equal_images() -> None:
    one = torch.randn(1, 3, 8, 8)
    assert images.spread(one.expand(10, -1, -1, -1)) == 0
    # Two images ±a: every pixel varies by a², and so do all numbers together.
    assert images.spread(torch.cat([one, -one])) == pytest.approx(1)
    # x ± a around a pattern: V_b = 1, V = 1 + 9.
    pattern = torch.tensor([3.0, -3.0])
    pair = torch.stack([pattern + 1, pattern - 1])
    assert images.spread(pair) == pytest.approx((1 / 10) ** 0.5)
    assert images.spread(torch.zeros(3, 2)) == 0


def test_distance_of_pairs_matches_hand_computed_values() -> None:
    features = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0], [6.0, 8.0]])
    # Squares: 25, 0, 100, 25, 25, 100.
    assert images.distance_of_pairs(features) == pytest.approx((275 / 6) ** 0.5)
    assert images.distance_of_pairs(features[:1]) == 0
    within = images.within_classes(features, torch.tensor([0, 1, 0, 1]))
    # Pairs of one class: 0 and 25.
    assert within == pytest.approx((12.5 / (275 / 6)) ** 0.5)
    assert images.within_classes(features, torch.arange(4)) is None


def test_coverage_counts_predicted_classes() -> None:
    logits = torch.tensor([[9.0, 0, 0], [9, 0, 0], [0, 9, 0], [9, 0, 0]])
    found = images.coverage(logits, torch.tensor([0, 1, 1, 2]))
    assert (found.predicted, found.possible, found.as_labelled) == (2, 3, 50)
    assert found.confidence == pytest.approx(100 * math.exp(9) / (math.exp(9) + 2), abs=1e-4)


def test_clipped_matches_a_hand_computed_share() -> None:
    pixels = torch.tensor([-0.1, 0.0, 0.5, 1.001, 1.1]).view(5, 1, 1, 1)
    assert images.clipped(pixels, UNIT) == pytest.approx(40)  # 1.001 rounds to white
    shifted = (pixels - 0.5) / 0.25
    assert images.clipped(shifted, Preprocessing((0.5,), (0.25,))) == pytest.approx(40)


def test_by_class_chooses_four_images_of_each_class() -> None:
    labels = torch.tensor([2, 1, 2, 2, 1, 2, 2, 0])
    assert images.by_class(labels, 8) == [7, 1, 4, 0, 2, 3, 5]
    assert images.by_class(None, 3) == [0, 1, 2]
    many = images.by_class(torch.arange(400) % 100, 400)
    assert len(many) == 40


def test_thumbnails_are_small_and_empty_for_other_inputs() -> None:
    assert images.thumbnails(torch.zeros(2, 3, 128, 64), UNIT).shape == (2, 3, 64, 32)
    assert images.thumbnails(torch.full((1, 1, 2, 2), 0.5), UNIT).tolist() == [[[[128] * 2] * 2]]
    for inputs in (torch.zeros(2, 5, 8, 8), torch.zeros(2, 7)):
        assert images.thumbnails(inputs, UNIT).size == 0


def test_distances_do_not_depend_on_the_batch(teacher: Captured) -> None:
    batch, labels = networks.images(7), torch.arange(7) % networks.CLASSES
    whole = images.measure_images(teacher, batch, labels, UNIT)
    three = MemoryBudget(4 * 3 * forward_bytes(teacher.network.graph))
    parts = images.measure_images(teacher, batch, labels, UNIT, three)
    network = StatisticsNetwork(teacher)
    _, seen = network(batch)
    for index, (a, b) in enumerate(zip(whole.distances, parts.distances, strict=True)):
        assert a.synthetic == pytest.approx(b.synthetic, rel=1e-4)
        expected = relative_statistics_loss([seen[index]], [network.stored[index]])
        assert a.synthetic == pytest.approx(float(expected), rel=1e-4)
    assert [distance.name for distance in whole.distances] == ["bn1", "bn2"]


def test_images_of_noise_have_the_distances_of_noise(teacher: Captured) -> None:
    """And the diversity of noise."""
    noise = noise_like_inputs(64, teacher)["natural"]
    found = images.measure_images(teacher, noise, None, UNIT)
    assert all(d.synthetic == pytest.approx(d.natural) for d in found.distances)
    assert found.diversity.features == pytest.approx(1)
    assert found.classes is None
    assert found.diversity.within_class is None


def test_noise_has_the_input_statistics_of_the_network() -> None:
    draw = torch.Generator().manual_seed(0)
    pixels = 120 + 60 * natural_noise(64, (3, 16, 16), SpectralSource(), draw)
    teacher = capture(networks.that_saw(pixels), pixels[:1])
    noise = noise_like_inputs(64, teacher)["white"]
    assert float(noise.mean()) == pytest.approx(120, abs=12)
    assert float(noise.std()) == pytest.approx(60, abs=12)
    (distance,) = images.measure_images(teacher, pixels, None, UNIT).distances
    assert distance.natural < 0.2
