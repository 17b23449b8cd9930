"""The similarity of outputs, by their kind."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gdfq.analysis.similarity import Totals, compare_outputs
from gdfq.graph.ends import NO_ENDS, Ends

SIGMOID, UNIT = Ends(("sigmoid",), (0,)), Ends(("unit_norm",), (0,))
MAP = Ends(("softmax",), (0,), dims=(1,))


def test_relative_error_of_values_matches_a_hand_computed_number() -> None:
    (found,) = compare_outputs([torch.tensor([3.0, 4.0])], [torch.tensor([3.0, 5.0])], NO_ENDS)
    assert found.relative_error == pytest.approx(100 / 5)
    assert (found.cosine, found.decisions) == (None, None)


def test_cosine_of_unit_vectors_matches_a_hand_computed_number() -> None:
    vectors = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    turned = torch.tensor([[0.6, 0.8], [0.0, 1.0]])
    (found,) = compare_outputs([vectors], [turned], UNIT)
    assert found.cosine == pytest.approx(0.8)
    assert found.relative_error == pytest.approx(100 * math.sqrt(0.8 / 2))


@given(st.floats(-100, 100))
def test_error_of_a_sigmoid_does_not_depend_on_the_offset_of_its_labels(offset: float) -> None:
    """Rare labels have logits far below 0; that they have is no signal."""
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(32, 3, generator=draw, dtype=torch.float64)
    noise = 0.1 * torch.randn(32, 3, generator=draw, dtype=torch.float64)
    expected = 100 * float(noise.norm() / (logits - logits.mean(0)).norm())
    moved = logits + offset * torch.tensor([0.0, 1.0, -2.0])
    (found,) = compare_outputs([moved], [moved + noise], SIGMOID)
    assert found.relative_error == pytest.approx(expected, rel=1e-6)
    same = ((moved > 0) == (moved + noise > 0)).double().mean()
    assert found.decisions == pytest.approx(100 * float(same))


@given(st.floats(-100, 100))
def test_error_of_a_map_of_classes_does_not_depend_on_a_number_added(offset: float) -> None:
    draw = torch.Generator().manual_seed(0)
    logits, noise = torch.randn(2, 4, 3, 5, 5, generator=draw, dtype=torch.float64)
    (found,) = compare_outputs([logits], [logits + 0.1 * noise], MAP)
    (moved,) = compare_outputs([logits + offset], [logits + 0.1 * noise - offset], MAP)
    assert moved.relative_error == pytest.approx(found.relative_error, rel=1e-6)


def test_similarity_does_not_depend_on_batches() -> None:
    draw = torch.Generator().manual_seed(0)
    expected, actual = torch.randn(2, 30, 4, generator=draw)
    for ends in (NO_ENDS, SIGMOID, UNIT):
        totals = Totals(ends)
        for pair in zip(expected.split(7), actual.split(7), strict=True):
            totals.add_(*([tensor] for tensor in pair))
        (found,), (whole,) = totals.similarities(), compare_outputs([expected], [actual], ends)
        assert vars(found) == pytest.approx(vars(whole))
