"""Requantization with two roundings, against numbers computed by hand and exact fractions."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gdfq.functional.gemmlowp import (
    doubling_high_product,
    quantized_multiplier,
    requantized,
    requantized_sum,
    rounding_right_shift,
)


@pytest.mark.parametrize(
    ("factor", "expected"),
    [
        (0.75, (3 * 2**29, 0)),
        (1.0, (2**30, 1)),
        (0.1, (1717986918, -3)),  # 0.8 · 2^31 = 1717986918.4
        (1 - 2**-40, (2**30, 1)),  # the multiplier would be 2^31
        (2.0**-40, (0, 0)),
        (0.0, (0, 0)),
    ],
)
def test_multiplier_has_31_bits(factor: float, expected: tuple[int, int]) -> None:
    assert quantized_multiplier(factor) == expected


def test_high_product_rounds_halves_up() -> None:
    a = torch.tensor([1, -1, 3, -3, 5])
    assert doubling_high_product(a, 2**30).tolist() == [1, 0, 2, -1, 3]


def test_right_shift_rounds_halves_away_from_zero() -> None:
    a = torch.tensor([1, -1, 3, -3, 6, -6, 7])
    assert rounding_right_shift(a, 1).tolist() == [1, -1, 2, -2, 3, -3, 4]
    assert rounding_right_shift(a, 2).tolist() == [0, 0, 1, -1, 2, -2, 2]
    assert rounding_right_shift(a, 0).tolist() == a.tolist()


def test_requantized_number_is_rounded_twice() -> None:
    """5 · 0.28125 = 1.40625; 5 · 0.5625 = 2.8125 becomes 3, and 3/2 becomes 2."""
    a = torch.tensor([5, -5, 4, 1000])
    assert requantized(a, 0.28125).tolist() == [2, -2, 1, 282]
    assert requantized(a, 2.5).tolist() == [13, -12, 10, 2500]


def test_requantized_channels_have_their_factors() -> None:
    a = torch.tensor([[10, 10, 10], [-7, -7, -7]])
    found = requantized(a, [0.5, 0.25, 0.125], dim=1)
    assert found.tolist() == [[5, 3, 1], [-3, -2, -1]]


def test_sum_beyond_int32_is_refused() -> None:
    assert requantized(torch.tensor([2**31 - 1]), 0.5).tolist() == [2**30]
    with pytest.raises(OverflowError):
        requantized(torch.tensor([2**30]), 2.5)


@given(st.integers(-(2**31) + 1, 2**31 - 1), st.floats(2.0**-20, 0.99))
def test_requantized_number_is_near_the_exact_one(a: int, factor: float) -> None:
    """Each rounding adds at most a half, the first in units of 2^shift."""
    multiplier, shift = quantized_multiplier(factor)
    exact = Fraction(a) * Fraction(multiplier, 2**31) * Fraction(2) ** shift
    found = int(requantized(torch.tensor(a), factor))
    assert abs(found - exact) <= Fraction(1, 2) + Fraction(1, 2) * Fraction(2) ** min(shift, 0)


@given(st.integers(-255, 255), st.integers(-255, 255), st.sampled_from([1, -1]))
def test_requantized_sum_is_the_nearest_number_apart_from_ties(x: int, y: int, sign: int) -> None:
    """Terms are shifted by 20 bits, so that only numbers next to n + 1/2 may differ."""
    scales, scale = (0.03, 0.011), 0.05
    exact = (x * scales[0] + sign * y * scales[1]) / scale
    found = int(requantized_sum(torch.tensor(x), torch.tensor(y), scales, scale, sign))
    assert abs(found - exact) <= 0.5 + 1e-4
