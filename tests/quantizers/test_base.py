"""QDrop, and the limits and known ranges of activations."""

import pytest
import torch
from support.narrowing import present

from gdfq.functional.grid import clips_alike, code_bounds
from gdfq.quantizers.base import QDrop
from gdfq.quantizers.lsq import LearnedRange
from gdfq.quantizers.minmax import MovingRange


def test_qdrop_passes_the_given_share() -> None:
    through, otherwise = torch.ones(100, 100), torch.zeros(100, 100)
    mixed = QDrop(0.3, torch.Generator().manual_seed(0))(through, otherwise)
    assert float(mixed.mean()) == pytest.approx(0.3, abs=0.02)


def test_learned_range_ends_at_its_limits_and_still_learns() -> None:
    quantizer = LearnedRange(4)
    quantizer.limits = (0.0, 6.0)
    quantizer.observe_(torch.linspace(0, 6, 100))
    with torch.no_grad():
        quantizer.log_scale.fill_(0.5)  # the scale that is learned is far above the limit
    scale, zero_point = quantizer.grid()
    assert float(zero_point) == -8
    assert 14.55 * float(scale) == pytest.approx(6)
    x = torch.linspace(0, 6, 100)
    quantizer(x).square().sum().backward()
    gradient = float(present(quantizer.log_scale.grad))
    assert gradient > 0  # a step against it lowers the scale
    with torch.no_grad():
        quantizer.log_scale.fill_(-1.0)
    assert float(quantizer.grid()[0]) < 0.9 * 6 / 15  # below the limit it is the learned one


@pytest.mark.parametrize("limits", [(-1.0, 1.0), (-0.5, 2.0), (0.0, 6.0), (-3.0, float("inf"))])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_grid_of_every_quantizer_clips_as_its_limits_do(
    limits: tuple[float, float], bits: int
) -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).mul_(5).clamp(*limits)
    for quantizer in (LearnedRange(bits), MovingRange(bits)):
        quantizer.limits = limits
        quantizer.observe_(x)
        scale, zero_point = quantizer.grid()
        assert scale > 0
        for change in (1 - 1e-4, 1, 1 + 1e-4):  # as freezing may change it
            assert clips_alike(limits, change * scale, zero_point, bits)
        # Numbers of the grid exceed a limit by less than half a step.
        low, high = (float((code - zero_point) * scale) for code in code_bounds(bits))
        assert limits[0] - scale / 2 < low
        assert high < limits[1] + scale / 2


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_limits_hardly_change_the_grid_of_all_values_between_them(bits: int) -> None:
    for limits in ((-1.0, 1.0), (-1.0, 4.9), (-0.5, 6.0), (0.0, 6.0)):
        x = torch.linspace(*limits, 1000)
        free, limited = MovingRange(bits), MovingRange(bits)
        limited.limits = limits
        free.observe_(x)
        limited.observe_(x)
        assert 0.92 < float(limited.grid()[0] / free.grid()[0]) <= 1


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_known_range_is_covered_whatever_is_observed(bits: int) -> None:
    known = (-0.485 / 0.229, 0.515 / 0.229)
    for quantizer in (LearnedRange(bits), MovingRange(bits)):
        quantizer.known_range = known
        for scale in (0.1, 30.0):
            quantizer.observe_(torch.randn(100) * scale)
        step, zero_point = quantizer.grid()
        assert float(step) == pytest.approx((known[1] - known[0]) / (2**bits - 1), rel=1e-5)
        lowest, _ = code_bounds(bits)
        assert float(zero_point) == lowest - round(known[0] / float(step))
