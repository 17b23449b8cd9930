"""The loss that is expected without data; `test_end_to_end.py` has it on real digits."""

import json
import math
from dataclasses import fields

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import networks

from gdfq.analysis.accuracy_drop import _SOURCE, LAW, Law, comparable, judged, made, measure, mixed
from gdfq.api import quantize
from gdfq.execution.context import Context
from gdfq.graph.capture import Captured, capture
from gdfq.sources.base import Source
from gdfq.sources.pool import collect

ERRORS = st.floats(0.0, 2.0)


def test_the_law_by_hand():
    law = Law(shift=0.0, power=2.0, error=0.0, limit=1.0)
    # An error of 1/3 makes odds of 1/9, which are a share of 1/10.
    assert law.drop(1 / 3) == pytest.approx(10.0)
    assert law.drop(1.0) == pytest.approx(50.0)
    assert law.drop(0.0) == 0.0


def test_errors_of_many_classes_harm_more():
    assert comparable(0.25, 10) == 0.25
    assert comparable(0.25, 10**4) == pytest.approx(0.5)


def test_the_interval_by_hand():
    law = Law(shift=0.0, power=1.0, error=0.6931471805599453, limit=1.0)  # log 2
    assert law.interval(9.0) == pytest.approx((4.0, 19.0))
    assert law.interval(0.0) == pytest.approx((0.0, 1.0))
    assert law.interval(80.0) == pytest.approx((39.5, 100.0))


@given(ERRORS, ERRORS)
def test_a_greater_error_never_means_less_loss(one: float, other: float):
    less, more = sorted((one, other))
    assert LAW.drop(less) <= LAW.drop(more)


@given(ERRORS)
def test_the_expected_drop_lies_in_its_interval(error: float):
    drop = LAW.drop(error)
    low, high = LAW.interval(drop)
    assert 0 <= low <= drop <= high <= 100


def test_a_mixture_lies_between_two_images():
    images = torch.eye(3)[:, :, None, None]
    made = mixed(images, 200, torch.Generator().manual_seed(0)).flatten(1)
    assert made.shape == (200, 3)
    torch.testing.assert_close(made.sum(1), torch.ones(200))
    assert set((made > 0).sum(1).tolist()) == {1, 2}  # of two images, or of one with itself
    two = made[(made > 0).sum(1) == 2]
    assert float(two.amax(1).min()) >= 0.5


def test_the_same_answers_lose_nothing():
    seen = judged([LOGITS], [LOGITS], source="by hand")
    assert (seen.agreement, seen.relative_error, seen.reason) == (100.0, 0.0, "")
    assert (seen.kl, seen.expected_drop) == (0.0, 0.0)
    assert seen.interval is not None
    assert seen.interval[1] < 2.0


def test_the_images_are_not_those_of_a_recipe_with_the_same_seed(teacher: Captured, monkeypatch):
    asked = []

    def noted(source: Source, teacher: Captured, count: int, *, context: Context):
        asked.append(context.seed)
        return collect(source, teacher, count, context=context)

    monkeypatch.setattr("gdfq.analysis.accuracy_drop.collect", noted)
    measure(teacher, teacher.network, seed=3)
    measure(teacher, teacher.network, seed=4)
    assert len({3, 4, *asked}) == 4


def test_one_seed_gives_the_same_figures(teacher: Captured):
    student = quantize(teacher, networks.images(1), "w4a4", "quick", steps=4, seed=0)
    first = measure(teacher, student.network, seed=1)
    assert measure(teacher, student.network, seed=1) == first
    assert measure(teacher, student.network, seed=2) != first


@pytest.mark.parametrize(
    ("name", "why"),
    [("Detector", "not classes"), ("Transformer", "batch norms"), ("Audio", "take images")],
)
def test_it_cannot_tell_where_it_was_not_validated(name: str, why: str):
    shape = networks.shape_of(name)
    found = capture(networks.make(name), networks.images(2, shape=shape))
    seen = measure(found, found.network, seed=0)
    assert seen.expected_drop is None
    assert seen.interval is None
    assert why in seen.reason
    assert seen.relative_error == 0.0


LOGITS = torch.eye(4).repeat(8, 1)
"""A teacher's, who sees four classes in turn."""


def test_figures_by_hand():
    student = LOGITS.clone()
    student[0] = LOGITS[1]  # one answer of 32 is another
    seen = judged([LOGITS], [student], source="by hand")
    assert (seen.images, seen.agreement) == (32, 100 * 31 / 32)
    assert seen.relative_error == pytest.approx(100 * math.sqrt(2 / 32))
    # p and its neighbour: e / (e + 3) and 1 / (e + 3) change places.
    assert seen.kl == pytest.approx((math.e - 1) / (math.e + 3) / 32, rel=1e-5)
    assert seen.expected_drop == pytest.approx(LAW.drop(comparable(math.sqrt(2 / 32), 4)))
    assert seen.reason == ""


@pytest.mark.parametrize(
    ("teacher", "student", "why"),
    [
        (LOGITS, LOGITS * float("nan"), "not finite"),
        (LOGITS, LOGITS.roll(1, 1), "off by"),
        (LOGITS[:1].expand(8, 4), LOGITS[:1].expand(8, 4), "same answer"),
    ],
)
def test_it_cannot_tell_from_answers_that_say_nothing(teacher, student, why: str):
    seen = judged([teacher], [student], source="by hand")
    assert seen.expected_drop is None
    assert seen.interval is None
    assert why in seen.reason
    json.dumps(seen.as_values(), allow_nan=False)


def test_the_images_are_of_the_kind_that_the_law_was_fitted_on():
    """Of deviation 1 and one contrast, whatever scale the network knows."""
    pixels = 0.3 * torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    images = made(capture(networks.that_saw(pixels), pixels[:1]), seed=0)
    assert float(images.std()) > 0.45
    assert float(images.flatten(1).std(1).log().std()) < 0.3


def test_the_images_of_the_law_do_not_follow_those_of_the_recipes():
    """Each setting stands where the law's images are made: another default would be another law."""
    inherited = {field.name for field in fields(_SOURCE)} - set(
        vars(type(_SOURCE))["__annotations__"]
    )
    assert inherited == {"contrast"}  # which `look` does without
    assert _SOURCE.optimizer.lr == 0.05
