"""Moving ranges of activations."""

import pytest
import torch
from support import networks
from support.narrowing import instance
from support.small_runs import calibrated
from torch import Tensor

from gdfq.quantizers.minmax import MovingRange


def test_moving_range_matches_hand_computed_values() -> None:
    # Momentum 0.9, maxima 1 then 3: m1 = 0.1, tracked 1; m2 = 0.39, tracked 0.39/0.19.
    quantizer = MovingRange(4)
    quantizer.observe_(torch.tensor([0.0, 1.0]))
    assert float(quantizer.scale) * 15 == pytest.approx(1.0, rel=1e-6)
    quantizer.observe_(torch.tensor([0.5, 3.0]))
    assert float(quantizer.scale) * 15 == pytest.approx(0.39 / 0.19, rel=1e-5)
    assert float(quantizer.zero_point) == -8  # the range starts at 0


def test_moving_range_of_constant_inputs_is_exact() -> None:
    quantizer = MovingRange(8)
    for _ in range(200):
        quantizer.observe_(torch.tensor([-1.0, 2.0]))
        assert float(quantizer.scale) * 255 == pytest.approx(3.0, rel=1e-4)


def test_moving_range_contains_zero() -> None:
    quantizer = MovingRange(4)
    quantizer.observe_(torch.tensor([2.0, 3.0]))
    quantizer.observing = False
    assert float(quantizer(torch.tensor(0.0))) == 0
    assert float(quantizer(torch.tensor(9.0))) == pytest.approx(3.0)


def test_ranges_are_fixed_after_calibration() -> None:
    student = calibrated(networks.captured("Residual"), "w4a4", "full")
    before = [float(instance(q.scale, Tensor)) for q in student.activations]
    student(networks.images(8) * 100)
    assert [float(instance(q.scale, Tensor)) for q in student.activations] == before
