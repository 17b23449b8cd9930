"""Scores of images that were made for no network."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from gdfq.functional.losses import patch_entropies, patch_entropy, relative_statistics_loss
from gdfq.functional.screening import (
    batch_norm_sensitivity,
    energy,
    image_moments,
    joint_moments,
    moments_without_each,
)


def test_energy_is_minus_the_logarithm_of_the_sum_of_exponentials() -> None:
    logits = torch.tensor([[0.0, 0.0], [2.0, 0.0], [1000.0, 0.0]])
    expected = [-math.log(2), -math.log(math.e**2 + 1), -1000.0]
    torch.testing.assert_close(energy(logits), torch.tensor(expected))
    warm = [-2 * math.log(2), -2 * math.log(math.e + 1), -1000.0]
    torch.testing.assert_close(energy(logits, 2.0), torch.tensor(warm))


def test_image_moments_are_over_the_positions_of_each_image() -> None:
    x = torch.tensor([[[1.0, 3.0], [0.0, 0.0]], [[5.0, 5.0], [2.0, 6.0]]])
    mean, variance = image_moments(x)
    assert mean.tolist() == [[2, 0], [5, 4]]
    assert variance.tolist() == [[1, 0], [0, 4]]
    mean, variance = image_moments(torch.tensor([[7.0, 8.0]]))
    assert (mean.tolist(), variance.tolist()) == ([[7, 8]], [[0, 0]])


def test_moments_without_each_are_those_of_the_others() -> None:
    x = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 3 + 100
    moments = image_moments(x)
    variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    torch.testing.assert_close(joint_moments(*moments), (mean, variance))
    means, variances = moments_without_each(*moments)
    for out in range(5):
        others = torch.cat([x[:out], x[out + 1 :]])
        variance, mean = torch.var_mean(others, (0, 2, 3), correction=0)
        torch.testing.assert_close((means[out], variances[out]), (mean, variance))


def test_sensitivity_of_two_images_is_as_computed_by_hand() -> None:
    """Both have variance 1 and means 0 and 2; the network's statistics are 0 and 1."""
    images = [(torch.tensor([[0.0], [2.0]]), torch.ones(2, 1))]
    target = [(torch.zeros(1), torch.ones(1))]
    both = 1 + (math.sqrt(2) - 1) ** 2
    expected = torch.tensor([2 * (both - 4), 2 * (both - 0)])
    torch.testing.assert_close(batch_norm_sensitivity(images, target), expected)


@given(seed=st.integers(0, 1000), count=st.integers(2, 6))
def test_sensitivity_is_the_distance_with_and_without_an_image(seed: int, count: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    features = [torch.randn(count, c, 3, 3, generator=draw).double() for c in (2, 5)]
    target = [
        (torch.randn(c, generator=draw).double(), torch.rand(c, generator=draw).double())
        for c in (2, 5)
    ]

    def distance(chosen: list[int]) -> torch.Tensor:
        pools = (image_moments(feature[chosen]) for feature in features)
        return relative_statistics_loss([joint_moments(*pool) for pool in pools], target)

    everything = list(range(count))
    expected = torch.stack(
        [
            count * (distance(everything) - distance(everything[:i] + everything[i + 1 :]))
            for i in everything
        ]
    )
    actual = batch_norm_sensitivity(list(map(image_moments, features)), target)
    torch.testing.assert_close(actual, expected)


def test_patch_entropy_is_the_mean_of_the_entropies_of_groups() -> None:
    patches = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0))
    patches[0] = 1.0  # equal patches have the least
    entropies = patch_entropies(patches)
    assert entropies.argmin() == 0
    torch.testing.assert_close(patch_entropy(patches), entropies.mean())
