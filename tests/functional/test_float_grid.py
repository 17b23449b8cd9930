"""Floating-point grids against ml_dtypes, exact fractions, and values computed by hand."""

import itertools
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gdfq.functional.float_grid import (
    ALL_FORMATS,
    E1M2,
    E2M1,
    E3M0,
    E3M4,
    E4M3,
    E5M2,
    FORMATS,
    NumberFormat,
    best_format,
    best_scale,
    decode,
    dequantize_float,
    encode,
    fake_quantize_float,
    formats_of,
    full_scale,
    magnitudes,
    nearest,
    neighbours,
)

REFERENCES: dict[NumberFormat, Any] = {
    E4M3: ml_dtypes.float8_e4m3fn,
    E5M2: ml_dtypes.float8_e5m2,
    E3M4: ml_dtypes.float8_e3m4,
    E2M1: ml_dtypes.float4_e2m1fn,
}
with_reference = pytest.mark.parametrize("form", REFERENCES, ids=str)
of_any_format = pytest.mark.parametrize("form", ALL_FORMATS, ids=str)


def numbers_of(form: NumberFormat) -> list[Fraction]:
    """The numbers >= 0 of a format by the formula, in exact fractions, in the order of codes."""
    found = []
    for code in range(form.largest_code + 1):
        exponent, fraction = divmod(code, 2**form.mantissa)
        share = Fraction(fraction, 2**form.mantissa)
        power = Fraction(2) ** ((exponent or 1) - form.bias)
        found.append(power * (share + (1 if exponent else 0)))
    return found


@with_reference
def test_codes_stand_for_the_numbers_of_the_reference(form: NumberFormat) -> None:
    codes = np.arange(2**form.bits, dtype=np.uint8)
    expected = codes.view(REFERENCES[form]).astype(np.float32)
    finite = np.isfinite(expected)
    assert (codes[finite] & form.magnitude_bits).max() == form.largest_code
    found = decode(torch.from_numpy(codes[finite]), form)
    assert found.numpy().tobytes() == expected[finite].tobytes()  # bits, so that −0 is not 0


@with_reference
def test_rounding_gives_the_codes_of_the_reference(form: NumberFormat) -> None:
    table = magnitudes(form).numpy()
    ties = (table[1:] + table[:-1]) / 2
    draw = np.random.default_rng(0).normal(size=20000).astype(np.float32)
    wide = draw * np.exp(2 * np.random.default_rng(1).normal(size=20000)).astype(np.float32)
    beside = np.concatenate([np.nextafter(ties, 0), ties, np.nextafter(ties, np.float32(1e9))])
    x = np.concatenate(
        [beside, -beside, wide, draw * form.largest / 4, np.array([0.0, -0.0], np.float32)]
    )
    x = x.clip(-form.largest, form.largest)
    expected = x.astype(REFERENCES[form])
    found = encode(nearest(torch.from_numpy(x), form), form)
    assert np.array_equal(found.numpy(), expected.view(np.uint8))


def test_largest_numbers_are_those_of_the_specifications() -> None:
    # OCP's 8-bit and MX specifications; E3M4 of IEEE form ends at 2^3 (1 + 15/16).
    largest = {E4M3: 448.0, E5M2: 57344.0, E3M4: 15.5, E2M1: 6.0, E1M2: 3.5, E3M0: 16.0}
    assert {form: form.largest for form in largest} == largest
    unsigned = {"UE2M2": 7.0, "UE3M1": 24.0, "UE1M3": 3.75, "UE4M4": 496.0, "UE3M5": 31.5}
    assert {name: FORMATS[name].largest for name in unsigned} == unsigned
    assert {FORMATS[name].lowest for name in unsigned} == {0.0}


@of_any_format
def test_numbers_are_those_of_the_formula(form: NumberFormat) -> None:
    assert [Fraction(x) for x in magnitudes(form).tolist()] == numbers_of(form)
    assert magnitudes(form)[-1] == form.largest


@of_any_format
def test_every_number_is_its_own_nearest_and_has_its_code(form: NumberFormat) -> None:
    codes = torch.arange(form.largest_code + 1, dtype=torch.uint8)
    if form.signed:
        codes = torch.cat([codes, codes | form.sign_bit])
    numbers = decode(codes, form)
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(nearest(numbers.to(dtype), form), numbers.to(dtype))
    assert torch.equal(encode(numbers, form), codes)


@of_any_format
def test_numbers_beyond_the_ends_saturate(form: NumberFormat) -> None:
    x = torch.tensor([1e30, -1e30, torch.inf, form.largest * 1.4])
    assert nearest(x, form).tolist() == [form.largest, form.lowest, form.largest, form.largest]


@given(form=st.sampled_from(ALL_FORMATS), x=st.floats(-70000, 70000, width=32))
def test_no_number_is_nearer_than_the_nearest(form: NumberFormat, x: float) -> None:
    numbers = numbers_of(form)
    numbers += [-n for n in numbers] if form.signed else []
    found = float(nearest(torch.tensor([x]), form))
    assert Fraction(found) in numbers
    assert abs(Fraction(found) - Fraction(x)) == min(abs(n - Fraction(x)) for n in numbers)


@pytest.mark.parametrize("form", [f for f in ALL_FORMATS if f.mantissa], ids=str)
def test_ties_go_to_the_even_code(form: NumberFormat) -> None:
    table = magnitudes(form).double()
    codes = encode(nearest((table[1:] + table[:-1]) / 2, form), form)
    assert not (codes % 2).any()


def test_fake_quantization_is_dequantization_of_codes() -> None:
    x = torch.tensor([[0.3, -1.0], [7.0, 0.1]])
    scale = torch.tensor([[0.5], [1.0]])
    # 0.6 -> 0.5, −2 -> −2; 7 -> 6 (the largest), 0.1 -> 0.
    assert fake_quantize_float(x, scale, "E2M1").tolist() == [[0.25, -1.0], [6.0, 0.0]]
    codes = torch.tensor([[1, 12], [7, 0]], dtype=torch.uint8)
    assert torch.equal(dequantize_float(codes, scale, "E2M1"), torch.tensor([[0.25, -1], [6, 0]]))


def test_neighbours_enclose_a_number() -> None:
    x = torch.tensor([2.5, 3.0, -0.2, -9.0, 9.0, -6.0])
    below, above = neighbours(x, E2M1)
    assert below.tolist() == [2.0, 3.0, -0.5, -6.0, 6.0, -6.0]
    assert above.tolist() == [3.0, 4.0, 0.0, -6.0, 6.0, -4.0]


def test_formats_of_a_number_of_bits() -> None:
    assert formats_of(4, signed=True) == (E2M1, E1M2, E3M0)
    assert formats_of(8, signed=True) == (E4M3, E5M2, E3M4)
    assert {form.name for form in formats_of(4)} == {"E2M1", "E1M2", "E3M0", "UE1M3", "UE2M2", "UE3M1"}  # fmt: skip
    assert formats_of(8, (E2M1, E5M2)) == (E5M2,)


def test_scale_of_values_that_are_on_a_grid_is_found_exactly() -> None:
    # 0.85 times the scale that just reaches the largest value is 0.25: one of the candidates.
    form, scale = E2M1, 0.25
    x = decode(torch.arange(16, dtype=torch.uint8), form) * scale
    x = torch.cat([x, torch.tensor([form.largest * scale / 0.85])])
    found, error = best_scale(x[:-1], x[-1], form, torch.sum)
    assert float(found) == pytest.approx(scale)
    assert float(error) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("values", "form"),
    [
        (torch.linspace(-3.5, 3.5, 15), E1M2),  # evenly spread
        (torch.tensor([s * 2.0**e for s in (1, -1) for e in range(-2, 5)]), E3M0),  # by powers of 2
        (decode(torch.arange(16, dtype=torch.uint8), E2M1), E2M1),
    ],
    ids=["E1M2", "E3M0", "E2M1"],
)
def test_search_finds_the_format_that_values_come_from(
    values: torch.Tensor, form: NumberFormat
) -> None:
    found, scale = best_format(values, values.abs().amax(), formats_of(4, signed=True), torch.sum)
    assert found == form
    assert float(scale) == pytest.approx(1.0)


def test_search_is_as_good_as_trying_every_scale() -> None:
    x = torch.randn(2000, generator=torch.Generator().manual_seed(0))
    reach = x.abs().amax()
    for form in ALL_FORMATS[:6]:
        _, error = best_scale(x, reach, form, torch.sum)
        full = full_scale(reach, form)
        tried = [
            float((fake_quantize_float(x, full * i / 1000, form.name) - x).square().sum())
            for i in range(200, 1001)
        ]
        assert float(error) <= 1.05 * min(tried), form


def test_scale_of_zeros_is_one() -> None:
    zeros = torch.zeros(5)
    for form in (E2M1, E4M3):
        scale, error = best_scale(zeros, zeros.amax(), form, torch.sum)
        assert 0.2 < float(scale) <= 1.04
        assert float(error) == 0


def test_formats_differ_in_their_names() -> None:
    assert len(FORMATS) == len(ALL_FORMATS)
    assert all(a != b for a, b in itertools.combinations(ALL_FORMATS, 2))
