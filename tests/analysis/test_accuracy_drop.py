"""The expected accuracy drop; `test_end_to_end.py` measures it on real digits."""

import json
import math
from dataclasses import fields
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import networks

from gdfq.analysis.accuracy_drop import (
    _SOURCE,
    LAW,
    Law,
    error_among_ten_classes,
    estimate_drop,
    make_images,
    measure_expected_drop,
    mix_images,
)
from gdfq.api import quantize
from gdfq.execution.context import Context
from gdfq.graph.capture import Captured, capture
from gdfq.sources.base import Source
from gdfq.sources.pool import collect

ERRORS = st.floats(0.0, 2.0)


def test_law_matches_a_hand_computed_drop() -> None:
    law = Law(shift=0.0, power=2.0, error=0.0, limit=1.0)
    # An error of 1/3 makes odds of 1/9, which are a share of 1/10.
    assert law.drop(1 / 3) == pytest.approx(10.0)
    assert law.drop(1.0) == pytest.approx(50.0)
    assert law.drop(0.0) == 0.0


def test_error_among_ten_classes_grows_with_the_number_of_classes() -> None:
    assert error_among_ten_classes(0.25, 10) == 0.25
    assert error_among_ten_classes(0.25, 10**4) == pytest.approx(0.5)


def test_interval_matches_hand_computed_ends() -> None:
    law = Law(shift=0.0, power=1.0, error=0.6931471805599453, limit=1.0)  # log 2
    assert law.interval(9.0) == pytest.approx((4.0, 19.0))
    assert law.interval(0.0) == pytest.approx((0.0, 1.0))
    assert law.interval(80.0) == pytest.approx((39.5, 100.0))


@given(ERRORS, ERRORS)
def test_drop_is_monotonic_in_the_error(one: float, other: float) -> None:
    less, more = sorted((one, other))
    assert LAW.drop(less) <= LAW.drop(more)


@given(ERRORS)
def test_interval_contains_the_expected_drop(error: float) -> None:
    drop = LAW.drop(error)
    low, high = LAW.interval(drop)
    assert 0 <= low <= drop <= high <= 100


def test_mixture_lies_between_two_images() -> None:
    images = torch.eye(3)[:, :, None, None]
    mixtures = mix_images(images, 200, torch.Generator().manual_seed(0)).flatten(1)
    assert mixtures.shape == (200, 3)
    torch.testing.assert_close(mixtures.sum(1), torch.ones(200))
    assert set((mixtures > 0).sum(1).tolist()) == {1, 2}  # of two images, or of one with itself
    two = mixtures[(mixtures > 0).sum(1) == 2]
    assert float(two.amax(1).min()) >= 0.5


def test_equal_outputs_have_no_expected_drop() -> None:
    estimate = estimate_drop([LOGITS], [LOGITS], source="by hand")
    assert (estimate.agreement, estimate.relative_error, estimate.reason) == (100.0, 0.0, "")
    assert (estimate.kl, estimate.expected_drop) == (0.0, 0.0)
    assert estimate.interval is not None
    assert estimate.interval[1] < 2.0


def test_images_differ_from_those_of_a_recipe_with_the_same_seed(
    teacher: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = []

    def recorded(source: Source, teacher: Captured, count: int, *, context: Context) -> Any:
        seeds.append(context.seed)
        return collect(source, teacher, count, context=context)

    monkeypatch.setattr("gdfq.analysis.accuracy_drop.collect", recorded)
    measure_expected_drop(teacher, teacher.network, seed=3)
    measure_expected_drop(teacher, teacher.network, seed=4)
    assert len({3, 4, *seeds}) == 4


def test_estimate_depends_on_the_seed_alone(teacher: Captured) -> None:
    student = quantize(teacher, networks.images(1), "w4a4", "quick", steps=4, seed=0)
    first = measure_expected_drop(teacher, student.network, seed=1)
    assert measure_expected_drop(teacher, student.network, seed=1) == first
    assert measure_expected_drop(teacher, student.network, seed=2) != first


@pytest.mark.parametrize(
    ("name", "reason"),
    [("Detector", "not classes"), ("Transformer", "batch norms"), ("Audio", "take images")],
)
def test_estimate_is_absent_where_the_law_was_not_validated(name: str, reason: str) -> None:
    shape = networks.shape_of(name)
    found = capture(networks.make(name), networks.images(2, shape=shape))
    estimate = measure_expected_drop(found, found.network, seed=0)
    assert estimate.expected_drop is None
    assert estimate.interval is None
    assert reason in estimate.reason
    assert estimate.relative_error == 0.0


LOGITS = torch.eye(4).repeat(8, 1)
"""Logits of a teacher that predicts four classes in turn."""


def test_estimate_matches_hand_computed_numbers() -> None:
    student = LOGITS.clone()
    student[0] = LOGITS[1]  # one prediction of 32 differs
    estimate = estimate_drop([LOGITS], [student], source="by hand")
    assert (estimate.images, estimate.agreement) == (32, 100 * 31 / 32)
    assert estimate.relative_error == pytest.approx(100 * math.sqrt(2 / 32))
    # Two probabilities, e / (e + 3) and 1 / (e + 3), are exchanged.
    assert estimate.kl == pytest.approx((math.e - 1) / (math.e + 3) / 32, rel=1e-5)
    assert estimate.expected_drop == pytest.approx(
        LAW.drop(error_among_ten_classes(math.sqrt(2 / 32), 4))
    )
    assert estimate.reason == ""


@pytest.mark.parametrize(
    ("teacher", "student", "reason"),
    [
        (LOGITS, LOGITS * float("nan"), "not finite"),
        (LOGITS, LOGITS.roll(1, 1), "relative error"),
        (LOGITS[:1].expand(8, 4), LOGITS[:1].expand(8, 4), "same class"),
    ],
)
def test_estimate_is_absent_for_outputs_out_of_range(
    teacher: Captured, student: Any, reason: str
) -> None:
    estimate = estimate_drop([teacher], [student], source="by hand")
    assert estimate.expected_drop is None
    assert estimate.interval is None
    assert reason in estimate.reason
    json.dumps(estimate.as_values(), allow_nan=False)


def test_images_have_the_statistics_that_the_law_was_fitted_on() -> None:
    """Standard deviation 1 and one contrast, whatever the input statistics of the network are."""
    pixels = 0.3 * torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    images = make_images(capture(networks.that_saw(pixels), pixels[:1]), seed=0)
    assert float(images.std()) > 0.45
    assert float(images.flatten(1).std(1).log().std()) < 0.3


def test_images_of_the_law_do_not_depend_on_the_defaults_of_recipes() -> None:
    """All settings are written out: with another default the law would not hold."""
    inherited = {field.name for field in fields(_SOURCE)} - set(
        vars(type(_SOURCE))["__annotations__"]
    )
    assert inherited == {"contrast"}  # which `input_statistics` does not use
    assert _SOURCE.optimizer.lr == 0.05
