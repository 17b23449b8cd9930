"""Floating-point grids of 4 and 8 bits, as pure functions.

A code has a sign s (unless the format is unsigned), e exponent bits E and m mantissa bits M. With
the exponent bias β it stands for

    F = (−1)^s · 2^(E − β) · (1 + M / 2^m)   for E > 0
    F = (−1)^s · 2^(1 − β) · M / 2^m         for E = 0 (subnormal numbers and 0)

and a tensor on the grid for x_q = Δ F with a real scale Δ > 0, which takes the place of a real
exponent bias (arXiv 2408.06995). Rounding is to the nearest number, half to even, and saturates at
the largest one.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from gdfq.files.plain_values import tagged

_EXPONENTS = {torch.float32: (torch.int32, 0x7F800000), torch.float64: (torch.int64, 0x7FF << 52)}
"""By type of a number, integers of its size and those of their bits that are its exponent."""
_FLOAT32_BIAS, _FLOAT32_MANTISSA = 127, 23


class Specials(Enum):
    """Which codes are no finite numbers."""

    NONE = "none"
    """All are finite."""
    NAN = "nan"
    """The largest magnitude is NaN, as in OCP's E4M3."""
    IEEE = "ieee"
    """The largest exponent is that of infinities and NaN, as in IEEE 754 and OCP's E5M2."""


@tagged("NumberFormat")
@dataclass(frozen=True)
class NumberFormat:
    """A floating-point format; the exponent bias is 2^(e−1) − 1.

    Attributes:
        exponent: e, exponent bits, 1..5.
        mantissa: m, mantissa bits, 0..5.
        specials: Which codes are no finite numbers.
        signed: Whether a code has a sign bit, which is its highest.
    """

    exponent: int
    mantissa: int
    specials: Specials = Specials.NONE
    signed: bool = True

    @property
    def name(self) -> str:
        """Name such as `E4M3`, or `UE4M4` of an unsigned format."""
        return f"{'' if self.signed else 'U'}E{self.exponent}M{self.mantissa}"

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.signed + self.exponent + self.mantissa

    @property
    def bias(self) -> int:
        """Exponent bias β."""
        return (1 << self.exponent - 1) - 1

    @property
    def largest_code(self) -> int:
        """The code of the largest number."""
        not_finite = {Specials.NONE: 0, Specials.NAN: 1, Specials.IEEE: 1 << self.mantissa}
        return self.magnitude_bits - not_finite[self.specials]

    @property
    def largest(self) -> float:
        """The largest number."""
        exponent, fraction = divmod(self.largest_code, 2**self.mantissa)
        return float(2.0 ** (exponent - self.bias) * (1 + fraction / 2**self.mantissa))

    @property
    def lowest(self) -> float:
        """The lowest number: 0 of an unsigned format."""
        return -self.largest if self.signed else 0.0

    @property
    def sign_bit(self) -> int:
        """The bit of a code that is its sign; 0 of an unsigned format."""
        return self.magnitude_bits + 1 if self.signed else 0

    @property
    def magnitude_bits(self) -> int:
        """The bits of a code that are not its sign."""
        return (1 << self.exponent + self.mantissa) - 1

    def __str__(self) -> str:
        return self.name


E4M3 = NumberFormat(4, 3, Specials.NAN)
E5M2 = NumberFormat(5, 2, Specials.IEEE)
E3M4 = NumberFormat(3, 4, Specials.IEEE)
E2M1, E1M2, E3M0 = NumberFormat(2, 1), NumberFormat(1, 2), NumberFormat(3, 0)
_UNSIGNED = tuple(
    NumberFormat(e, bits - e, signed=False)
    for bits, es in ((8, (3, 4, 5)), (4, (1, 2, 3)))
    for e in es
)
ALL_FORMATS = (E4M3, E5M2, E3M4, E2M1, E1M2, E3M0, *_UNSIGNED)
FORMATS: Mapping[str, NumberFormat] = {form.name: form for form in ALL_FORMATS}
"""All formats by name. Those of 8 signed bits are the ones of OCP and of ml_dtypes, E2M1 is OCP's;
the unsigned ones use the bit of the sign for the number (MSFP, arXiv 2505.21591)."""


def formats_of(
    bits: int, among: Sequence[NumberFormat] = ALL_FORMATS, *, signed: bool = False
) -> tuple[NumberFormat, ...]:
    """Return the formats of so many bits.

    Args:
        bits: Bits of a code.
        among: The formats to choose from.
        signed: Whether unsigned formats are left out.
    """
    return tuple(form for form in among if form.bits == bits and form.signed >= signed)


def magnitudes(form: NumberFormat) -> Tensor:
    """Return the numbers >= 0 of a format in ascending order, which is that of their codes."""
    codes = torch.arange(form.largest_code + 1, dtype=torch.uint8)
    return decode(codes, form)


def _binade(x: Tensor) -> Tensor:
    """Return the power of two at or below |x|; 0 where x is 0."""
    integers, mask = _EXPONENTS[x.dtype]
    return x.view(integers).bitwise_and(mask).view(x.dtype)


def nearest_(x: Tensor, form: NumberFormat) -> Tensor:
    """Round x in place to the nearest numbers F of a format, half to even, and return it.

    What is beyond the largest number saturates there.

    Args:
        x: Finite numbers in units of the scale, float32 or float64.
        form: The format.
    """
    x.clamp_(form.lowest, form.largest)
    spacing = _binade(x).clamp_(min=2.0 ** (1 - form.bias)).mul_(2.0**-form.mantissa)
    return x.div_(spacing).round_().mul_(spacing)


def nearest(x: Tensor, form: NumberFormat) -> Tensor:
    """Return what `nearest_` makes of x."""
    return nearest_(x.clone(), form)


def encode(numbers: Tensor, form: NumberFormat) -> Tensor:
    """Return the codes, uint8, of numbers that are on the grid of a format, as those of `nearest`.

    The sign of −0 is that of its code.
    """
    table = magnitudes(form).to(numbers)
    codes = torch.searchsorted(table, numbers.abs().contiguous()).to(torch.uint8)
    if not form.signed:
        return codes
    return torch.where(numbers.signbit(), codes + form.sign_bit, codes)


def decode(codes: Tensor, form: NumberFormat) -> Tensor:
    """Return the numbers F, float32, of codes that are finite numbers."""
    whole = codes.to(torch.int32)
    magnitude = whole & form.magnitude_bits
    exponent, fraction = magnitude >> form.mantissa, magnitude & (2**form.mantissa - 1)
    is_normal = (exponent > 0).to(torch.int32)
    power = exponent + (1 - is_normal) + (_FLOAT32_BIAS - form.bias - form.mantissa)
    units = (power << _FLOAT32_MANTISSA).view(torch.float32)  # 2^(E − β − m), exactly
    numbers = (fraction + (is_normal << form.mantissa)) * units
    return torch.where(whole & form.sign_bit != 0, -numbers, numbers) if form.signed else numbers


def fake_quantize_float(x: Tensor, scale: Tensor, name: str) -> Tensor:
    """Return x_q = Δ F: x rounded to the grid of the format of this name; the scale broadcasts."""
    return nearest_(x / scale, FORMATS[name]).mul_(scale)


def dequantize_float(codes: Tensor, scale: Tensor, name: str) -> Tensor:
    """Return the numbers x_q = Δ F of codes of the format of this name."""
    return decode(codes, FORMATS[name]) * scale


def neighbours(x: Tensor, form: NumberFormat) -> tuple[Tensor, Tensor]:
    """Return the numbers F below (or at) and above x between which rounding chooses.

    Beyond the ends of the grid both are its end.

    Args:
        x: Finite numbers in units of the scale.
        form: The format.
    """
    positive = magnitudes(form).to(x)
    table = torch.cat([-positive.flip(0)[:-1], positive]) if form.signed else positive
    below = torch.searchsorted(table, x.contiguous(), right=True) - 1
    last = len(table) - 1
    return table[below.clamp(0, last)], table[(below + 1).clamp(0, last)]


_CANDIDATE_COUNT, _COARSE_STRIDE = 80, 5
"""Number of candidate scales: the one whose grid reaches the largest value times 1, 0.99, ...; and
the stride of the coarse search, which comes first."""


def full_scale(reach: Tensor, form: NumberFormat) -> Tensor:
    """Return the scale with which a format's largest number is `reach` >= 0; 1 where that is 0."""
    scale = reach / form.largest
    return torch.where(scale < torch.finfo(scale.dtype).tiny, torch.ones_like(scale), scale)


def best_scale(
    x: Tensor, reach: Tensor, form: NumberFormat, total: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the scale of least Σ (x_q − x)² for a format, and this error.

    Candidates shrink the scale with which no value is clipped, first by 5 %, then by 1 % around the
    best.

    Args:
        x: A tensor.
        reach: The largest |x| of the values that share a scale, in a shape that broadcasts to x.
        form: The format.
        total: Returns the sums of a tensor shaped as x over the values that share a scale, shaped
            as `reach`.

    Returns:
        Scale (> 0) and error, shaped as `reach`.
    """
    full = full_scale(reach, form)
    best, least = full, torch.full_like(full, torch.inf)

    def best_of(scales: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
        found, error = best, least
        for scale in scales:
            errors = total((fake_quantize_float(x, scale, form.name) - x).square())
            found = torch.where(errors < error, scale, found)
            error = torch.minimum(errors, error)
        return found, error

    best, least = best_of(full * (1 - i / 100) for i in range(0, _CANDIDATE_COUNT, _COARSE_STRIDE))
    return best_of([best + full * (i / 100) for i in range(1 - _COARSE_STRIDE, _COARSE_STRIDE)])


def best_format(
    x: Tensor,
    reach: Tensor,
    forms: Sequence[NumberFormat],
    total: Callable[[Tensor], Tensor],
) -> tuple[NumberFormat, Tensor]:
    """Return the format and the scales of least Σ (x_q − x)² (arXiv 2408.06995).

    A tensor has one format; among equals the first counts.

    Args:
        x: See `best_scale`, as for `reach` and `total`.
        reach: The largest magnitudes.
        forms: The formats to choose from, at least one.
        total: Sums over the values that share a scale.

    Returns:
        The format, and its scales (> 0), shaped as `reach`.
    """
    found = [(form, *best_scale(x, reach, form, total)) for form in forms]
    form, scale, _ = min(found, key=lambda each: float(each[2].sum()))
    return form, scale
