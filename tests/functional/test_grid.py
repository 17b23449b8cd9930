"""Grids and fake quantization, against values computed by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.narrowing import present
from torch import tensor

from gdfq import UsageError
from gdfq.functional.grid import (
    UNLIMITED,
    Bits,
    Layout,
    affine_grid,
    along_channels,
    channel_range,
    clips_alike,
    dequantize,
    fake_quantize,
    largest_scale,
    quantize,
    straight_through,
)


def test_fake_quantize_matches_hand_computed_values_at_two_bits() -> None:
    # Range [-1, 2], k = 2: Δ = 3/3 = 1; z maps -1 to code -2, so z = -2 + 1 = -1.
    scale, zero_point = affine_grid(tensor(-1.0), tensor(2.0), 2)
    assert scale == 1
    assert zero_point == -1
    x = tensor([-5.0, -1.0, -0.4, 0.6, 2.0, 9.0])
    assert quantize(x, scale, zero_point, 2).tolist() == [-2, -2, -1, 0, 1, 1]
    assert fake_quantize(x, scale, zero_point, 2).tolist() == [-1, -1, 0, 1, 2, 2]


def test_fake_quantize_rounds_half_to_even_before_the_zero_point() -> None:
    # Δ = 1 and an odd z: 0.5 -> 0, 1.5 -> 2, 2.5 -> 2, as ONNX's QuantizeLinear.
    x = tensor([0.5, 1.5, 2.5])
    assert (quantize(x, tensor(1.0), tensor(-7.0), 4) + 7).tolist() == [0, 2, 2]


def test_affine_grid_is_exact_for_constant_ranges() -> None:
    for value in (3.0, -0.25, 0.0):
        low = tensor(value)
        grid = affine_grid(low, low, 4)
        assert fake_quantize(low, *grid, 4) == pytest.approx(value, rel=1e-6)
        assert grid[0] > 0


@given(
    low=st.floats(-100, 0),
    width=st.floats(1e-3, 200),
    bits=st.integers(2, 8),
    part=st.floats(0, 1),
)
def test_error_within_the_range_is_at_most_half_a_scale(
    low: float, width: float, bits: int, part: float
) -> None:
    low_, high_ = tensor(low, dtype=torch.double), tensor(low + width, dtype=torch.double)
    scale, zero_point = affine_grid(low_, high_, bits)
    x = low_ + part * (high_ - low_)
    # The zero point is an integer, so the grid may sit half a step off the range's ends.
    assert abs(fake_quantize(x, scale, zero_point, bits) - x) <= scale * (1 + 1e-9)
    codes = quantize(x, scale, zero_point, bits)
    assert codes == codes.round()
    assert -(2 ** (bits - 1)) <= codes <= 2 ** (bits - 1) - 1
    assert dequantize(codes, scale, zero_point, bits) == fake_quantize(x, scale, zero_point, bits)


@given(low=st.floats(-50, 0), high=st.floats(0, 50), bits=st.integers(2, 8))
def test_zero_is_exact_if_the_range_contains_it(low: float, high: float, bits: int) -> None:
    grid = affine_grid(tensor(low), tensor(high), bits)
    assert fake_quantize(tensor(0.0), *grid, bits) == 0


def test_gradient_passes_where_values_clip() -> None:
    x = tensor([-9.0, 0.3, 9.0], requires_grad=True)
    grid = affine_grid(tensor(-1.0), tensor(1.0), 3)
    (straight_through(x, *grid, 3) * tensor([1.0, 2.0, 3.0])).sum().backward()
    assert present(x.grad).tolist() == [1, 2, 3]


def test_channel_range_suits_convolutions_and_transposed_convolutions() -> None:
    weight = torch.arange(16.0).view(4, 2, 2)
    low, high = channel_range(weight, Layout.ROWS)
    assert low.flatten().tolist() == [0, 4, 8, 12]
    assert high.flatten().tolist() == [3, 7, 11, 15]
    # [I=4, O/g=2, k=2] in two groups: channel (g, j) is weight[2g:2g+2, j].
    low, high = channel_range(weight, Layout.TRANSPOSED, groups=2)
    assert low.shape == high.shape == (4, 2, 1)
    assert low[:, :, 0].tolist() == [[0, 2], [0, 2], [8, 10], [8, 10]]
    assert high[:, :, 0].tolist() == [[5, 7], [5, 7], [13, 15], [13, 15]]
    factors = along_channels(tensor([1.0, 2.0, 3.0, 4.0]), weight, Layout.TRANSPOSED, 2)
    assert factors[:, :, 0].tolist() == [[1, 2], [1, 2], [3, 4], [3, 4]]


@pytest.mark.parametrize("text", ["w4", "4", "w1a4", "w4a9", "a4w4", "w4a4x", ""])
def test_bits_refuse_invalid_text(text: str) -> None:
    with pytest.raises(UsageError, match="w4a4"):
        Bits.parse(text)


def test_bits_round_trip_through_text() -> None:
    assert Bits.parse(" W3A8 ") == Bits(3, 8)
    assert str(Bits(3, 8)) == "w3a8"


def test_largest_scale_rounds_both_limits_to_the_last_codes() -> None:
    # 4 bits, z = -8: 15 steps above 0 and none below, so Δ = 6/14.55 for ReLU6.
    assert float(largest_scale(tensor(-8.0), 4, (0.0, 6.0))) == pytest.approx(6 / 14.55)
    # z = -2: 6 steps below, 9 above; 3/5.55 < 9/8.55.
    assert float(largest_scale(tensor(-2.0), 4, (-3.0, 9.0))) == pytest.approx(3 / 5.55)
    assert float(largest_scale(tensor(-2.0), 4, (-math.inf, 9.0))) == pytest.approx(9 / 8.55)
    assert float(largest_scale(tensor(-2.0), 4, UNLIMITED)) == math.inf


def test_grid_clips_alike_where_both_limits_round_to_its_last_codes() -> None:
    # z = -8, 4 bits: the highest code is 15 steps above 0, and 6/Δ must round to 15 or more.
    grid = tensor(-8.0), 4
    assert clips_alike((0.0, 6.0), tensor(0.4), *grid)
    assert clips_alike((0.0, 6.0), tensor(0.41), *grid)  # 14.63
    assert not clips_alike((0.0, 6.0), tensor(0.42), *grid)  # 14.29
    assert clips_alike((0.0, math.inf), tensor(9.0), *grid)
    assert not clips_alike((0.5, 6.0), tensor(0.4), *grid)
    assert not clips_alike((0.0, 6.0), tensor(0.4), tensor(-7.0), 4)  # one code below 0


@given(st.floats(0.01, 100), st.integers(-8, 7), st.integers(0, 2**32 - 1))
def test_clamp_changes_no_code_of_a_grid_that_clips_alike(
    scale: float, zero_point: int, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    low, high = (torch.rand(2, generator=draw) * tensor([-20.0, 20.0]) * scale).tolist()
    grid = tensor(scale), tensor(float(zero_point)), 4
    x = torch.linspace(-30, 30, 1001) * scale
    if clips_alike((low, high), *grid):
        assert quantize(x.clamp(low, high), *grid).equal(quantize(x, *grid))
