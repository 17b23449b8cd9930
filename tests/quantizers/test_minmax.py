"""Moving ranges of activations."""

import pytest
import torch
from support import networks
from support.small_runs import calibrated

from gdfq.quantizers.minmax import MovingRange


def test_the_moving_range_by_hand():
    # Momentum 0.9, maxima 1 then 3: m1 = 0.1, tracked 1; m2 = 0.39, tracked 0.39/0.19.
    quantizer = MovingRange(4)
    quantizer.observe_(torch.tensor([0.0, 1.0]))
    assert float(quantizer.scale) * 15 == pytest.approx(1.0, rel=1e-6)
    quantizer.observe_(torch.tensor([0.5, 3.0]))
    assert float(quantizer.scale) * 15 == pytest.approx(0.39 / 0.19, rel=1e-5)
    assert float(quantizer.zero_point) == -8  # the range starts at 0


def test_a_constant_range_is_tracked_exactly_for_ever():
    quantizer = MovingRange(8)
    for _ in range(200):
        quantizer.observe_(torch.tensor([-1.0, 2.0]))
        assert float(quantizer.scale) * 255 == pytest.approx(3.0, rel=1e-4)


def test_ranges_contain_zero():
    quantizer = MovingRange(4)
    quantizer.observe_(torch.tensor([2.0, 3.0]))
    quantizer.observing = False
    assert float(quantizer(torch.tensor(0.0))) == 0
    assert float(quantizer(torch.tensor(9.0))) == pytest.approx(3.0)


def test_ranges_stay_once_calibration_is_over():
    student = calibrated(networks.captured("Residual"), "w4a4", "full")
    before = [float(q.scale) for q in student.activations]
    student(networks.images(8) * 100)
    assert [float(q.scale) for q in student.activations] == before
