"""Fitted weights and compensated rounding against values computed by hand and by other means."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gdfq.functional.float_grid import E2M1 as FP4
from gdfq.functional.float_grid import nearest as nearest_number
from gdfq.functional.rounding import (
    Nearest,
    compensated,
    descended,
    fitted_weight,
    inverse_factor,
    nearest_codes,
    output_error,
    refitted_scale,
    rounded_for_outputs,
)


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_fitted_weight_matches_hand_computed_value() -> None:
    """One input of variance 2, covariance 3 with the output, λ = 1: (3 + 1·1) / (2 + 1)."""
    found = fitted_weight(
        column(1.0).view(1, 1, 1), column(2.0).view(1, 1, 1), column(3.0).view(1, 1, 1), column(1.0)
    )
    assert float(found) == pytest.approx(4 / 3)


def test_fitted_weight_is_the_least_squares_solution_without_a_ridge() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 100, 3, generator=draw, dtype=torch.float64)
    y = torch.randn(2, 100, 4, generator=draw, dtype=torch.float64)
    expected = torch.linalg.lstsq(x, y).solution.mT
    zeros = torch.zeros_like(expected)
    found = fitted_weight(zeros, x.mT @ x, y.mT @ x, torch.full((2,), 1e-12, dtype=x.dtype))
    torch.testing.assert_close(found, expected)


def test_fitted_weight_stays_where_the_inputs_say_nothing() -> None:
    weight = torch.tensor([[[2.0, 5.0]]], dtype=torch.float64)
    inputs = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]], dtype=torch.float64)
    cross = torch.tensor([[[3.0, 0.0]]], dtype=torch.float64)
    found = fitted_weight(weight, inputs, cross, column(1e-9))
    torch.testing.assert_close(found, torch.tensor([[[3.0, 5.0]]], dtype=torch.float64))


def codes_of(weight: Tensor, inputs: Tensor, bits: int = 4) -> Tensor:
    """Latent codes with Δ = 1 and z = 0."""
    nearest = nearest_codes(torch.zeros((), dtype=weight.dtype), bits)
    return compensated(weight, inverse_factor(inputs), torch.ones_like(weight), nearest)


def test_inverse_factor_matches_hand_computed_values() -> None:
    """A = ((1, 1), (1, 2)) in the other order is ((2, 1), (1, 1)), its inverse ((1, −1), (−1, 2))."""
    found = inverse_factor(torch.tensor([[[1.0, 1.0], [1.0, 2.0]]]))
    assert found.order.tolist() == [[1, 0]]
    torch.testing.assert_close(found.upper, torch.tensor([[[1.0, -1.0], [0.0, 1.0]]]))


def test_compensated_codes_match_hand_computed_values() -> None:
    """0.6 is rounded up to 1; the error 0.4 of the first is made up for by −0.4 · 1/1 in the second.

    Rounded alone the codes would be 1 and 1, with the error 2·0.4² + 2·0.4·0.4 + 0.4² = 0.8; those
    found, 1 and 0, have 2·0.4² − 2·0.4·0.6 + 0.6² = 0.2.
    """
    weight = column(0.6, 0.6).view(1, 1, 2)
    inputs = torch.tensor([[[2.0, 1.0], [1.0, 1.0]]], dtype=torch.float64)
    torch.testing.assert_close(codes_of(weight, inputs).flatten(), column(0.6, 0.2))
    # The order is that of the inputs' variance, not of the columns.
    swapped = codes_of(weight, inputs.flip(1, 2)).flatten()
    torch.testing.assert_close(swapped, column(0.2, 0.6))


def test_codes_of_inputs_without_covariance_are_rounded_alone() -> None:
    draw = torch.Generator().manual_seed(1)
    weight = 3 * torch.randn(2, 5, 7, generator=draw, dtype=torch.float64)
    inputs = torch.diag_embed(torch.rand(2, 7, generator=draw, dtype=torch.float64) + 0.1)
    torch.testing.assert_close(codes_of(weight, inputs), weight)


@pytest.mark.parametrize("columns", [5, 64, 130])  # fewer and more than one block
def test_compensation_halves_the_error_of_correlated_inputs(columns: int) -> None:
    draw = torch.Generator().manual_seed(columns)
    x = torch.randn(1, 400, columns, generator=draw, dtype=torch.float64)
    x = x + 2 * torch.randn(1, 400, 1, generator=draw, dtype=torch.float64)
    inputs = x.mT @ x / 400
    weight = 2 * torch.randn(1, 32, columns, generator=draw, dtype=torch.float64)

    def error(latent: Tensor) -> float:
        apart = latent.clamp(-8, 7).round() - weight
        return float(torch.einsum("grk,gkl,grl->", apart, inputs, apart))

    assert error(codes_of(weight, inputs)) < 0.5 * error(weight)


def test_nearest_codes_match_hand_computed_values() -> None:
    """Codes of 3 bits are −4 to 3: with z = −1 the numbers q − z are −3 to 4."""
    found = nearest_codes(torch.tensor(-1.0), 3)(torch.tensor([-9.0, -2.6, 0.4, 3.6, 9.0]))
    assert found.tolist() == [-3, -3, 0, 4, 4]


def test_output_error_matches_hand_computed_value() -> None:
    """(1, −1) A (1, −1)ᵀ of A = ((2, 1), (1, 3)): 2 − 1 − 1 + 3."""
    system = torch.tensor([[[2.0, 1.0], [1.0, 3.0]]])
    weight = torch.tensor([[[1.0, 2.0], [4.0, 4.0]]])
    values = torch.tensor([[[2.0, 1.0], [4.0, 4.0]]])
    assert output_error(weight, system, values).tolist() == [[3.0, 0.0]]


def test_descended_codes_match_hand_computed_values() -> None:
    """From the codes (1, 1) of W = (0.6, 0.6), with A = ((2, 1), (1, 1)).

    The slope of the first column is 2·0.4 + 1·0.4 = 1.2, and its lowest point 1 − 1.2/2 = 0.4, which
    is rounded to 0. The slope of the second is then −0.6 + 0.4 = −0.2, its lowest point 1.2.
    """
    weight = column(0.6, 0.6).view(1, 1, 2)
    system = torch.tensor([[[2.0, 1.0], [1.0, 1.0]]], dtype=torch.float64)
    ones = torch.ones_like(weight)
    found = descended(weight, system, ones, ones, torch.round)
    torch.testing.assert_close(found.flatten(), column(0.4, 1.2))


def test_refitted_scales_match_hand_computed_values() -> None:
    """One scale: (q A W) / (q A q) = (3·1.5 + 2·2.2) / (2 + 2 + 1). Two: each is exact."""
    weight = column(1.5, 2.2).view(1, 1, 2)
    system = torch.tensor([[[2.0, 1.0], [1.0, 1.0]]], dtype=torch.float64)
    ones = torch.ones_like(weight)
    one = refitted_scale(weight, system, ones[:, :, :1], ones)
    torch.testing.assert_close(one.flatten(), column(8.9 / 5))
    two = ones
    for _ in range(100):
        two = refitted_scale(weight, system, two, ones)
    torch.testing.assert_close(two, weight)


def test_refitted_scales_are_limited() -> None:
    """The best ones are −1, 5, 1.2 and, of codes that are all 0, any."""
    weight = column(-1.0, 5.0, 1.2, 2.0).view(1, 4, 1)
    numbers = column(1.0, 1.0, 1.0, 0.0).view(1, 4, 1)
    ones = torch.ones(1, 4, 1, dtype=torch.float64)
    found = refitted_scale(weight, ones[:, :1], ones, numbers)
    torch.testing.assert_close(found.flatten(), column(0.5, 2.0, 1.2, 1.0))


@st.composite
def layers(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """A weight [G, R, K], the covariance of correlated inputs, and scales of blocks."""
    groups, rows = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    columns, blocks = draw(st.sampled_from([(1, 1), (7, 1), (7, 2), (70, 1), (70, 3)]))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**30)))
    x = torch.randn(groups, 100, columns, generator=random, dtype=torch.float64)
    x = x + 2 * torch.randn(groups, 100, 1, generator=random, dtype=torch.float64)
    weight = torch.randn(groups, rows, columns, generator=random, dtype=torch.float64)
    scale = torch.rand(groups, rows, blocks, generator=random, dtype=torch.float64) + 0.1
    return weight, x.mT @ x / 100, scale


@given(layer=layers(), bits=st.integers(2, 8))
def test_each_improvement_lowers_the_error(layer: tuple[Tensor, Tensor, Tensor], bits: int) -> None:
    weight, inputs, scale = layer
    nearest = nearest_codes(torch.zeros((), dtype=weight.dtype), bits)
    ridge = torch.full((len(weight),), 0.1, dtype=weight.dtype)
    system = inputs + 0.1 * torch.eye(inputs.shape[1], dtype=weight.dtype)
    size = -(-weight.shape[2] // scale.shape[2])

    def all_columns(scale: Tensor) -> Tensor:
        return scale.repeat_interleave(size, 2)[:, :, : weight.shape[2]]

    def error(latent: Tensor, scale: Tensor) -> Tensor:
        return output_error(weight, system, nearest(latent) * all_columns(scale))

    first = compensated(weight, inverse_factor(system), all_columns(scale), nearest)
    codes = descended(weight, system, all_columns(scale), first, nearest)
    assert (error(codes, scale) <= error(first, scale) * (1 + 1e-9) + 1e-12).all()
    refitted = refitted_scale(weight, system, scale, nearest(codes))
    assert (refitted > 0).all()
    assert (error(codes, refitted) <= error(codes, scale) * (1 + 1e-9) + 1e-12).all()
    latent, found = rounded_for_outputs(weight, inputs, ridge, scale, nearest, bits)
    assert (error(latent, found) <= error(first, scale) * (1 + 1e-9) + 1e-12).all()
    if bits == 8:
        assert torch.equal(found, scale)
        assert torch.equal(latent, first)


E2M1 = partial(nearest_number, form=FP4)


@pytest.mark.parametrize(
    ("nearest", "bits", "most"),
    [
        (nearest_codes(torch.tensor(0.0), 3), 3, 0.92),
        (nearest_codes(torch.tensor(2.0), 3), 3, 0.85),  # codes −4 to 3, numbers −6 to 1
        (E2M1, 4, 0.85),
        (nearest_codes(torch.tensor(0.0), 8), 8, 1.0),
    ],
)
def test_scales_and_codes_are_better_than_compensation_alone(
    nearest: Nearest, bits: int, most: float
) -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1, 300, 40, generator=draw, dtype=torch.float64)
    x = x + torch.randn(1, 300, 1, generator=draw, dtype=torch.float64)
    weight = torch.randn(1, 50, 40, generator=draw, dtype=torch.float64)
    inputs, ridge = x.mT @ x / 300, column(0.1)
    system = inputs + 0.1 * torch.eye(40, dtype=torch.float64)
    largest = nearest(torch.tensor([-99.0, 99.0])).abs().amax()
    scale = weight.abs().amax(2, keepdim=True) / largest
    first = compensated(weight, inverse_factor(system), scale.expand_as(weight), nearest)
    latent, found = rounded_for_outputs(weight, inputs, ridge, scale, nearest, bits)
    errors = [
        output_error(weight, system, nearest(numbers) * steps).sum()
        for numbers, steps in ((latent, found), (first, scale))
    ]
    assert errors[0] <= most * errors[1]


def test_no_single_code_can_be_improved() -> None:
    """Against all other codes of each column, one at a time, of a converged descent."""
    random = torch.Generator().manual_seed(3)
    x = torch.randn(1, 50, 6, generator=random, dtype=torch.float64)
    weight = torch.randn(1, 3, 6, generator=random, dtype=torch.float64)
    system, scale = x.mT @ x / 50, torch.full_like(weight, 0.5)
    nearest = nearest_codes(torch.zeros((), dtype=weight.dtype), 3)
    latent = weight / scale
    for _ in range(20):
        latent = descended(weight, system, scale, latent, nearest)
    numbers = nearest(latent)
    least = output_error(weight, system, numbers * scale)
    for i in range(6):
        for code in range(-4, 4):
            other = numbers.clone()
            other[:, :, i] = code
            assert (output_error(weight, system, other * scale) >= least - 1e-12).all()
