"""Fitted weights and compensated rounding against values computed by hand and by other means."""

import pytest
import torch
from torch import Tensor

from gdfq.functional.rounding import compensated_codes, fitted_weight


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
    """Latent codes with Δ = 1 and z = 0, almost without a ridge."""
    rows = weight.shape[:2]
    ones = torch.ones(*rows, 1, dtype=weight.dtype)
    ridge = torch.full(rows[:1], 1e-12, dtype=weight.dtype)
    return compensated_codes(weight, inputs, ridge, ones, 0 * ones, bits)


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
