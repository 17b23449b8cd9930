"""The loss that is expected without data: its pieces by hand, and a real student end to end."""

import json
from dataclasses import replace

import networks
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import gdfq
from gdfq import demo
from gdfq.capture import Captured, capture
from gdfq.errors import UsageError
from gdfq.pipeline import quantize
from gdfq.recipes import find_recipe
from gdfq.sources.pool import ImagePool, collect
from gdfq.trust import LAW, Law, Trust, held_out, measure, mixed

SHARES = st.floats(0.0, 1.0)


def test_the_law_by_hand():
    law = Law(shift=0.0, power=2.0, error=0.0, range=(0.0, 1.0))
    # Odds of 1/3 make odds of 1/9, which are a share of 1/10.
    assert law.drop(0.25) == pytest.approx(10.0)
    assert law.drop(0.5) == pytest.approx(50.0)
    assert (law.drop(0.0), law.drop(1.0)) == (0.0, 100.0)


def test_the_interval_by_hand():
    law = Law(shift=0.0, power=1.0, error=0.6931471805599453, range=(0.0, 1.0))  # log 2
    assert law.interval(9.0) == pytest.approx((4.0, 19.0))
    assert law.interval(0.0) == pytest.approx((0.0, 1.0))
    assert law.interval(80.0) == pytest.approx((39.5, 100.0))


@given(SHARES, SHARES)
def test_more_disagreement_never_means_less_loss(one: float, other: float):
    less, more = sorted((one, other))
    assert LAW.drop(less) <= LAW.drop(more)


@given(SHARES)
def test_the_expected_drop_lies_in_its_interval(disagreement: float):
    drop = LAW.drop(disagreement)
    low, high = LAW.interval(drop)
    assert 0 <= low <= drop <= high <= 100


def test_a_mixture_lies_between_two_images():
    images = torch.eye(3)[:, :, None, None]
    made = mixed(images, 200, torch.Generator().manual_seed(0)).flatten(1)
    assert made.shape == (200, 3)
    torch.testing.assert_close(made.sum(1), torch.ones(200))
    assert set((made > 0).sum(1).tolist()) == {1, 2}  # of two images, or of one with itself
    two = made[(made > 0).sum(1) == 2]
    assert float(two.amax(1).max()) <= 0.7
    assert float(two[two > 0].min()) >= 0.3 - 1e-6


def test_the_same_network_loses_nothing(teacher: Captured):
    seen = measure(teacher, teacher.network, seed=0)
    assert (seen.agreement, seen.relative_error, seen.reason) == (100.0, 0.0, "")
    assert seen.kl == pytest.approx(0.0, abs=1e-6)
    assert seen.expected_drop == 0.0
    assert seen.interval is not None
    assert seen.interval[1] < 2.0


def test_the_images_are_not_those_of_a_recipe_with_the_same_seed(teacher: Captured):
    source = find_recipe("fast").source
    assert isinstance(source, ImagePool)
    images = held_out(teacher, seed=0)
    tuned_on, _ = collect(replace(source.source, batch=64), teacher, 64, seed=0)
    nearest = torch.cdist(images.flatten(1), tuned_on.flatten(1)).min(1).values
    assert float(nearest.min()) > 0.1 * float(tuned_on.flatten(1).norm(dim=1).mean())


def test_one_seed_gives_the_same_figures(teacher: Captured):
    student = quantize(teacher, networks.images(1), "w4a4", "quick", steps=4, seed=0)
    first = measure(teacher, student.network, seed=1)
    assert measure(teacher, student.network, seed=1) == first
    assert measure(teacher, student.network, seed=2) != first


@pytest.mark.parametrize(
    ("name", "why"),
    [("Detector", "not classes"), ("Transformer", "batch norms")],
)
def test_it_cannot_tell_where_it_was_not_validated(name: str, why: str):
    shape = networks.shape_of(name)
    found = capture(networks.make(name), networks.images(2, shape=shape))
    seen = measure(found, found.network, seed=0)
    assert seen.expected_drop is None
    assert seen.interval is None
    assert why in seen.reason
    assert str(seen).startswith("cannot tell: ")
    assert seen.relative_error == 0.0


class _Lost(nn.Module):
    """A student whose outputs have nothing to do with its teacher's."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = torch.full((len(x), networks.CLASSES), 0.0)
        logits[:, -1] = self.value
        return logits


@pytest.mark.parametrize(("value", "why"), [(float("nan"), "not finite"), (1.0, "disagree on")])
def test_it_cannot_tell_of_a_student_that_is_lost(teacher: Captured, value: float, why: str):
    seen = measure(teacher, _Lost(value), seed=0)
    assert seen.expected_drop is None
    assert why in seen.reason


def test_it_travels_as_json():
    seen = Trust("images", 8, 1.5, 90.0, 0.25, 1.0, (0.5, 2.0))
    assert Trust.from_values(json.loads(json.dumps(seen.as_values()))) == seen
    assert str(seen) == "1.0 points (0.5 to 2.0)"
    for damaged in ({}, {**seen.as_values(), "interval": [1.0]}, {**seen.as_values(), "more": 1}):
        with pytest.raises(UsageError, match="fields"):
            Trust.from_values(damaged)


def test_the_loss_of_real_digits_comes_as_expected():
    """Students from harmless to ruined: their order is foreseen, and the drop lies in the interval."""
    training, test = demo.load_digits()
    example = torch.zeros(1, *demo.INPUT_SHAPE)
    teacher = capture(demo.train(training), example)
    recipe = replace(find_recipe("quick"), tuning=None, steps=2, calibration=2, warmup=2)
    drops, seen = [], []
    for bits in ("w8a8", "w4a4", "w2a4"):
        student = gdfq.quantize(
            teacher, example, bits, recipe, test=(test.images, test.labels),
            mean=demo.PREPROCESSING.mean, std=demo.PREPROCESSING.std,
        )  # fmt: skip
        drops.append(student.metrics["teacher"]["top1"] - student.metrics["student"]["top1"])
        seen.append(measure(teacher, student.network, seed=0))
    expected = [trust.expected_drop for trust in seen]
    assert expected == sorted(expected)
    for drop, found in zip(drops, seen, strict=True):
        low, high = found.interval
        assert low - 1 <= drop <= high + 1
