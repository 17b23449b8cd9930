"""Smoothing, exact in float64, with divisors by hand."""

import torch
from support.language_model import captured_model, in_float64, tokens

from gdfq.equalizers.smooth import Smooth
from gdfq.functional.grid import Bits
from gdfq.graph import queries
from gdfq.graph.capture import Captured
from gdfq.graph.tensors import tensors_of
from gdfq.graph.walk import Walk
from gdfq.student.scheme import Scheme

SCHEME = Scheme(Bits.parse("w4a4"), "tokens")


def _peaks(teacher: Captured, name: str) -> torch.Tensor:
    for visit in Walk(teacher.network).visits(tokens(count=3, length=20)):
        if queries.has_weight(visit.node) and queries.layer_name(visit.node) == name:
            peaks: torch.Tensor = visit.inputs[0].abs().flatten(0, -2).amax(0)
            return peaks
    raise LookupError(name)


def test_smoothed_model_is_the_same_in_float64() -> None:
    teacher, given = in_float64(captured_model()), tokens(count=3, length=20)
    changed = Smooth().equal(teacher, SCHEME, [given], 0)
    with torch.no_grad():
        expected, actual = teacher.network(given), changed.network(given)
    assert float((actual - expected).abs().max() / expected.abs().max()) < 1e-5


def test_all_outliers_move_into_the_weights_at_strength_1() -> None:
    teacher, given = captured_model(), tokens(count=3, length=20)
    changed = Smooth(strength=1.0).equal(teacher, SCHEME, [given], 0)
    for name in ("blocks.1.attention.q", "blocks.1.gated.gate", "blocks.1.gated.down"):
        torch.testing.assert_close(_peaks(changed, name), torch.ones_like(_peaks(changed, name)))


def test_divisors_balance_activations_and_weights() -> None:
    teacher, given = captured_model(), tokens(count=3, length=20)
    changed = Smooth().equal(teacher, SCHEME, [given], 0)
    before, after = (
        tensors_of(t.network)["blocks.0.gated.down.weight"] for t in (teacher, changed)
    )
    divisor = (_peaks(teacher, "blocks.0.gated.down") / before.abs().amax(0)).sqrt()
    torch.testing.assert_close(after, before * divisor)
    torch.testing.assert_close(_peaks(changed, "blocks.0.gated.down"), after.abs().amax(0))
