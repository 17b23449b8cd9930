"""Quantizers with floating-point grids."""

import pytest
import torch
from torch import Tensor

from gdfq.functional.float_grid import (
    E1M2,
    E2M1,
    E3M0,
    E4M3,
    NumberFormat,
    dequantize_float,
    fake_quantize_float,
    formats_of,
    nearest,
)
from gdfq.functional.grid import Layout
from gdfq.quantizers.adaround import RoundedFloatWeight
from gdfq.quantizers.base import WeightQuantizer
from gdfq.quantizers.float_lsq import FloatRange, FloatWeight, best_weight_format
from gdfq.quantizers.lsq import learned_float_scale

ALL_OF_4, ALL_OF_8 = formats_of(4), formats_of(8)
SIGNED = {bits: formats_of(bits, signed=True) for bits in (4, 8)}


def weight_of(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def values_of(quantizer: WeightQuantizer, weight: Tensor) -> Tensor:
    """What the codes of a quantizer stand for."""
    found = quantizer.quantized(weight)
    assert found.form is not None
    assert found.codes.dtype == torch.uint8
    assert not found.zero_point.any()
    return dequantize_float(found.codes, found.scale, found.form.name)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("layout", [(Layout.ROWS, 1), (Layout.TRANSPOSED, 2)])
def test_float_weight_gives_what_its_codes_stand_for(bits: int, layout: tuple[Layout, int]) -> None:
    weight = weight_of(4, 6, 3, 3)
    quantizer = FloatWeight(weight, bits, *layout, forms=SIGNED[bits])
    form, scale = best_weight_format(weight, SIGNED[bits], *layout)
    expected = fake_quantize_float(weight, scale, form.name)
    torch.testing.assert_close(quantizer(weight).detach(), expected)
    torch.testing.assert_close(values_of(quantizer, weight), expected)
    channels = 4 if layout[0] is Layout.ROWS else 12
    assert quantizer.quantized(weight).scale.unique().numel() == channels
    factors = torch.linspace(0.5, 2, channels)
    quantizer.rescale_(factors)
    along = quantizer.along_channels(factors, weight)
    torch.testing.assert_close(values_of(quantizer, weight), expected * along)


def test_gradients_of_a_float_weight_match_hand_computed_values() -> None:
    # Δ = 1/6 with E2M1: 0.5 is 3 steps, and 1 is 6, the largest. c = 7/6 codes for each step.
    quantizer = FloatWeight(torch.tensor([[0.5, 1.0]]), 4, Layout.ROWS, forms=[E2M1])
    quantizer.scale.fill_(1 / 6)
    quantizer.codes.data = torch.tensor([[2.4, 100.0]]) * 7 / 6
    rounded = quantizer(torch.empty(0))
    torch.testing.assert_close(rounded.detach(), torch.tensor([[2.0, 6.0]]) / 6)
    rounded.sum().backward()
    # ∂w_q/∂v = Δ/c inside and 0 where clipped; ∂w_q/∂log Δ = w_q.
    torch.testing.assert_close(quantizer.codes.grad, torch.tensor([[1 / 7, 0.0]]))
    torch.testing.assert_close(quantizer.log_scale.grad, torch.tensor([[8 / 6]]))


def test_fitted_float_weight_compensates_for_its_rounding() -> None:
    """With inputs of covariance C, the error of outputs is smaller than with rounding alone."""
    weight, x = weight_of(8, 16), weight_of(200, 16) @ weight_of(16, 16)
    covariance = (x.T @ x / 200).double()[None]
    quantizer = FloatWeight(weight, 4, Layout.ROWS, forms=SIGNED[4])
    errors = []
    for _ in range(2):
        off = (values_of(quantizer, weight) - weight).double()
        errors.append(float((off @ covariance[0] @ off.T).diagonal().sum()))
        quantizer.fit_(weight, covariance, torch.tensor([1e-6], dtype=torch.float64))
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize("form", [E2M1, E3M0, E4M3], ids=str)
def test_learned_float_scale_matches_finite_differences_of_the_straight_through_form(
    form: NumberFormat,
) -> None:
    x = torch.tensor([0.3, -1.1, 2.7, 1e6, -1e6], dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    out = learned_float_scale(x, scale, form)
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=torch.float64)
    (out * weights).sum().backward()
    # x_q = Δ (u + constant) inside, with u = x/Δ and the rounding as a constant; Δ F outside.
    numbers = nearest(x.detach() / 0.5, form)
    inside = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(out.detach(), numbers * 0.5)
    torch.testing.assert_close(x.grad, weights * inside)
    slopes = numbers - inside * x.detach() / 0.5
    torch.testing.assert_close(scale.grad, (weights * slopes).sum())


def observed(quantizer: FloatRange, *batches: Tensor) -> FloatRange:
    quantizer.observing = True
    for batch in batches:
        quantizer(batch)
    quantizer.observing = False
    return quantizer


def test_float_range_takes_unsigned_formats_only_where_no_value_is_negative() -> None:
    x = weight_of(4000).abs()
    free = observed(FloatRange(4, forms=ALL_OF_4), x)
    assert free.form.signed
    limited = FloatRange(4, forms=ALL_OF_4)
    limited.limits = (0.0, float("inf"))
    observed(limited, x)
    assert not limited.form.signed

    def error(quantizer: FloatRange) -> float:
        return float((quantizer(x) - x).square().mean().detach())

    assert error(limited) < 0.5 * error(free)
    assert limited.extent() == pytest.approx(limited.form.largest * float(limited.grid()[0]))
    assert free.extent() == pytest.approx(2 * free.form.largest * float(free.grid()[0]))


def test_float_range_has_the_format_of_the_first_batch_and_the_mean_scale() -> None:
    first, second = weight_of(1000), 3 * weight_of(1000)
    apart = [observed(FloatRange(8, forms=ALL_OF_8), x) for x in (first, second)]
    both = observed(FloatRange(8, forms=ALL_OF_8), first, second)
    assert both.form == apart[0].form == apart[1].form
    scales = [float(quantizer.grid()[0]) for quantizer in apart]
    assert float(both.grid()[0]) == pytest.approx(sum(scales) / 2, rel=1e-4)


def test_float_range_of_a_known_range_covers_it() -> None:
    quantizer = FloatRange(8, forms=ALL_OF_8)
    quantizer.known_range = (-2.0, 3.0)
    observed(quantizer, torch.zeros(10))
    ends = torch.tensor([-2.0, 0.5, 3.0])
    torch.testing.assert_close(quantizer(ends).detach(), ends, rtol=0.02, atol=0)


def test_chosen_format_is_part_of_the_state() -> None:
    quantizer = observed(FloatRange(4, forms=ALL_OF_4), torch.linspace(-1, 1, 101))
    other = FloatRange(4, forms=ALL_OF_4)
    other.load_state_dict(quantizer.state_dict())
    assert other.form == quantizer.form == E1M2
    assert torch.equal(other(torch.linspace(-1, 1, 7)), quantizer(torch.linspace(-1, 1, 7)))


@pytest.mark.parametrize("bits", [4, 8])
def test_rounded_float_weight_starts_at_the_weight_and_ends_next_to_it(bits: int) -> None:
    weight = weight_of(3, 2, 3, 3)
    quantizer = RoundedFloatWeight(weight, bits, Layout.ROWS, forms=SIGNED[bits])
    steps = weight / quantizer.scale
    inside = steps.abs() < quantizer.form.largest
    torch.testing.assert_close(quantizer(weight)[inside], weight[inside], rtol=1e-3, atol=1e-3)
    nearest_ones = values_of(quantizer, weight)
    expected = fake_quantize_float(weight, quantizer.scale, quantizer.form.name)
    torch.testing.assert_close(nearest_ones, expected)
    quantizer.rounding_logits.data.neg_()  # every weight is rounded the other way
    quantizer.settle_()
    hard = quantizer(weight).detach()
    torch.testing.assert_close(values_of(quantizer, weight), hard)
    one_apart = (hard - weight).abs() <= (quantizer.gap * quantizer.scale * 1.0001)
    assert bool(one_apart[inside].all())
    assert not torch.equal(hard, expected)
