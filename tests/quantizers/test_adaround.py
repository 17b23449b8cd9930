"""Learned rounding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gdfq.functional.grid import Layout
from gdfq.quantizers.adaround import RoundedWeight


@settings(deadline=None)
@given(seed=st.integers(0, 2**31), bits=st.integers(2, 8))
def test_rounded_weight_starts_at_the_weight_and_ends_next_to_it(seed: int, bits: int) -> None:
    weight = torch.randn(3, 2, 3, 3, generator=torch.Generator().manual_seed(seed))
    quantizer = RoundedWeight(weight, bits, Layout.ROWS)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    exact = weight / quantizer.scale + quantizer.zero_point
    inside = (exact > low) & (exact < high)
    soft = quantizer(weight)
    torch.testing.assert_close(soft[inside], weight[inside], rtol=1e-3, atol=1e-3)
    quantizer.settled = True
    hard = quantizer(weight).detach()
    frozen = quantizer.quantized(weight)
    torch.testing.assert_close((frozen.codes - frozen.zero_point) * frozen.scale, hard)
    assert bool(((hard - weight)[inside].abs() <= 0.5001 * quantizer.scale.expand_as(weight)[inside]).all())  # fmt: skip


def test_rounding_penalty_matches_hand_computed_values() -> None:
    quantizer = RoundedWeight(torch.tensor([[0.0, 1.0]]), 2, Layout.ROWS)
    quantizer.rounding_logits.data = torch.tensor([[0.0, 100.0]])  # h = 0.5 and 1
    assert quantizer.rounding().tolist() == [[0.5, 1.0]]
    assert float(quantizer.rounding_penalty(2.0).detach()) == 1.0
    quantizer.rounding_logits.data = torch.tensor([[0.5, -100.0]])
    h = 1.2 / (1 + torch.tensor(-0.5).exp()) - 0.1
    assert float(quantizer.rounding_penalty(3.0).detach()) == pytest.approx(
        1 - abs(2 * float(h) - 1) ** 3
    )
