"""Losses, against values computed by hand."""

import math
from typing import Any, Literal

import numpy as np
import pytest
import torch
from support.narrowing import present
from torch import Tensor, tensor

from gdfq.functional.losses import (
    batch_norm_statistics_loss,
    class_boundary_loss,
    distillation_loss,
    feature_loss,
    focal_loss,
    relative_statistics_loss,
    standard_deviation_loss,
)


def test_boundary_loss_matches_a_hand_computed_value() -> None:
    # Two classes, logits (0, ln 3): p = (1/4, 3/4); labels 0 and 1.
    logits = tensor([[0.0, math.log(3)], [0.0, math.log(3)]])
    expected = (math.log(4) + math.log(4 / 3)) / 2
    assert float(class_boundary_loss(logits, tensor([0, 1]))) == pytest.approx(expected)


SEEN = [(tensor([1.0, 2.0]), tensor([4.0, 1.0])), (tensor([0.0]), tensor([9.0]))]


STORED = [(tensor([0.0, 0.0]), tensor([1.0, 1.0])), (tensor([2.0]), tensor([4.0]))]


def test_batch_norm_statistics_loss_matches_a_hand_computed_value() -> None:
    # Layer 1: MSE of means (1 + 4)/2, of variances (9 + 0)/2; layer 2: 4 and 25. Mean of layers.
    expected = ((2.5 + 4.5) + (4 + 25)) / 2
    assert float(batch_norm_statistics_loss(SEEN, STORED)) == pytest.approx(expected)


def test_standard_deviations_match_hand_computed_values() -> None:
    # Deviations 2, 1 against 1, 1 and 3 against 2; the sum over layers.
    expected = (2.5 + (1 + 0) / 2) + (4 + 1)
    assert float(standard_deviation_loss(SEEN, STORED)) == pytest.approx(expected)


def test_constant_channels_have_a_finite_gradient() -> None:
    variance = tensor([0.0], requires_grad=True)
    standard_deviation_loss([(tensor([0.0]), variance)], STORED[1:]).backward()
    assert present(variance.grad).isfinite().all()


@pytest.mark.parametrize(("reduction", "divisor"), [("batch", 3), ("element", 3 * 4)])
def test_distillation_loss_matches_numpy(
    reduction: Literal["element", "batch"], divisor: int
) -> None:
    student, teacher = np.random.default_rng(0).normal(size=(2, 3, 4))
    temperature = 5.0

    def softmax(x: Tensor) -> np.ndarray[Any, Any]:
        e = np.exp(x / temperature)
        return e / e.sum(1, keepdims=True)

    p, q = softmax(teacher), softmax(student)
    expected = temperature**2 * (p * np.log(p / q)).sum() / divisor
    actual = distillation_loss(torch.tensor(student), torch.tensor(teacher), temperature, reduction)
    assert float(actual) == pytest.approx(expected)


def test_relative_statistics_loss_matches_a_hand_computed_value() -> None:
    # Layer 1, σ = 1: means 1² and 2², deviations (2 − 1)² and 0: (1 + 1 + 4 + 0)/2.
    # Layer 2, σ = 2: mean ((0 − 2)/2)² = 1, deviation (3/2 − 1)² = 0.25.
    expected = (3 + 1.25) / 2
    assert float(relative_statistics_loss(SEEN, STORED)) == pytest.approx(expected)


def test_focal_loss_matches_a_hand_computed_value() -> None:
    # p_y = 1/4 and 3/4.
    logits = tensor([[0.0, math.log(3)], [0.0, math.log(3)]])
    expected = (0.75**2 * math.log(4) + 0.25**2 * math.log(4 / 3)) / 2
    assert float(focal_loss(logits, tensor([0, 1]), 2.0)) == pytest.approx(expected)
    plain = class_boundary_loss(logits, tensor([0, 1]))
    assert float(focal_loss(logits, tensor([0, 1]), 0.0)) == pytest.approx(float(plain))


def test_feature_loss_matches_a_hand_computed_value() -> None:
    seen = [tensor([[1.0, 2.0]]), tensor([[0.0]])]
    expected = [tensor([[1.0, 4.0]]), tensor([[2.0]])]
    # 4/17 of the first block's energy, all of the second's.
    assert float(feature_loss(seen, expected)) == pytest.approx((4 / 17 + 1) / 2)


def test_nearly_constant_channel_has_a_bounded_loss() -> None:
    """The deviation is divided by at least 10⁻³, and the target is the channel's own deviation."""
    still = [(tensor([5.0]), tensor([0.0]))]
    assert float(relative_statistics_loss(still, still)) == 0
    moved = [(tensor([5.001]), tensor([0.002**2]))]
    assert float(relative_statistics_loss(moved, still)) == pytest.approx(1 + 4, rel=1e-3)


def test_feature_loss_gradient_matches_autograd() -> None:
    for shape in ((4, 5), (3, 4, 5), (2, 3, 4, 5)):
        seen, expected = torch.randn(2, *shape, dtype=torch.double)
        if len(shape) == 4:
            seen = seen.contiguous(memory_format=torch.channels_last)
        seen.requires_grad_()
        assert torch.autograd.gradcheck(
            lambda a, b=expected: feature_loss([a, a], [b, b + 1]), seen
        )
