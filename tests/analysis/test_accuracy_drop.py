"""The expected accuracy drop; `test_end_to_end.py` measures it on real digits."""

import json
import math
from dataclasses import fields

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import networks
from support.choice import checked
from torch import Tensor, nn

from gdfq.analysis.accuracy_drop import (
    _SOURCE,
    LAW,
    DropEstimate,
    Law,
    distinct_classes,
    estimate_drop,
    logit_error,
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


def test_logit_error_matches_a_hand_computed_number() -> None:
    # Centred: (1, −1) and (0.6, −0.2, …); orthogonal to the teacher lies a noise of half its size.
    teacher = torch.tensor([[1.0, -1.0, 0.0]])
    student = teacher + 0.5 * torch.tensor([[1.0, 1.0, -2.0]]) / math.sqrt(3)
    expected = 0.5 * math.sqrt(math.log(3) / math.log(10))
    # The factor that brings the student nearest makes sin θ of tan θ = 1/2.
    assert logit_error(teacher, student) == pytest.approx(expected / math.sqrt(1.25))
    assert logit_error(teacher, -teacher) == pytest.approx(math.sqrt(math.log(3) / math.log(10)))
    assert logit_error(teacher, teacher * float("nan")) == math.inf


def test_logit_error_grows_with_the_number_of_classes() -> None:
    few, many = (torch.randn(16, n, generator=torch.Generator().manual_seed(0)) for n in (10, 1000))
    for logits, factor in ((few, 1.0), (many, math.sqrt(3))):
        centred = logits - logits.mean(1, keepdim=True)
        noise = torch.randn_like(centred)
        noise -= noise.mean(1, keepdim=True)
        noise -= centred * ((noise * centred).sum() / centred.square().sum())  # orthogonal
        noise *= 0.2 * centred.norm() / noise.norm()
        expected = factor * 0.2 / math.sqrt(1 + 0.2**2)
        assert logit_error(logits, logits + noise) == pytest.approx(expected, rel=1e-5)


NUMBERS = st.integers(0, 2**31 - 1)


def _logits(seed: int, classes: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a teacher and of a student whose error is somewhere between 0 and 100 %."""
    draw = torch.Generator().manual_seed(seed)
    teacher = 3 * torch.randn(24, classes, generator=draw, dtype=torch.float64)
    noise = torch.randn(24, classes, generator=draw, dtype=torch.float64)
    return teacher, teacher + 2 * float(torch.rand(1, generator=draw)) * noise


def _assert_same(one: DropEstimate, other: DropEstimate, *, kl: bool = True) -> None:
    """Agreement, expected drop, interval and reason are the same, and KL if it should be."""
    assert one.agreement == other.agreement
    assert one.logit_error == pytest.approx(other.logit_error, rel=1e-9)
    assert (one.expected_drop is None) == (other.expected_drop is None)
    assert one.reason.split("is")[0] == other.reason.split("is")[0]
    if one.expected_drop is not None:
        assert one.expected_drop == pytest.approx(other.expected_drop, rel=1e-6)
        assert one.interval == pytest.approx(other.interval, rel=1e-6, abs=1e-9)
    if kl:
        assert one.kl == pytest.approx(other.kl, rel=1e-3, abs=1e-5)


@given(NUMBERS, st.floats(-1e3, 1e3), st.floats(-1e3, 1e3))
def test_estimate_does_not_depend_on_numbers_added_to_all_logits(
    seed: int, of_teacher: float, of_student: float
) -> None:
    teacher, student = _logits(seed)
    estimate = estimate_drop([teacher], [student], source="by hand")
    by_image = torch.linspace(-1, 1, 24)[:, None]
    moved = estimate_drop(
        [teacher + of_teacher * by_image], [student + of_student], source="by hand"
    )
    _assert_same(estimate, moved)
    assert estimate.relative_error == pytest.approx(moved.relative_error, rel=1e-6)


@given(NUMBERS, st.floats(0.01, 100), st.floats(0.01, 100))
def test_estimate_does_not_depend_on_temperatures(
    seed: int, of_teacher: float, of_student: float
) -> None:
    """No answer changes; confidences do, so KL does. Only margins in units of the error count."""
    teacher, student = _logits(seed)
    estimate = estimate_drop([teacher], [student], source="by hand")
    scaled = estimate_drop([teacher * of_teacher], [student * of_student], source="by hand")
    _assert_same(estimate, scaled, kl=False)


@given(NUMBERS, st.permutations(range(6)))
def test_estimate_does_not_depend_on_the_order_of_classes(seed: int, order: list[int]) -> None:
    teacher, student = _logits(seed)
    estimate = estimate_drop([teacher], [student], source="by hand")
    _assert_same(
        estimate, estimate_drop([teacher[:, order]], [student[:, order]], source="by hand")
    )


@given(NUMBERS, st.lists(st.integers(0, 5), min_size=1, max_size=8))
def test_estimate_does_not_depend_on_copies_of_classes(seed: int, copies: list[int]) -> None:
    teacher, student = _logits(seed)
    columns = [*range(6), *copies]
    estimate = estimate_drop([teacher], [student], source="by hand")
    copied = estimate_drop([teacher[:, columns]], [student[:, columns]], source="by hand")
    _assert_same(estimate, copied, kl=False)
    assert distinct_classes(teacher[:, columns]) == list(range(6))


def test_class_that_is_never_predicted_is_no_signal() -> None:
    """One logit of −10⁴ for all images changes no answer, and must not hide the error of others."""
    teacher, student = _logits(1)
    dead = torch.full((24, 1), -1e4, dtype=torch.float64)
    padded = [torch.cat([logits, dead], 1) for logits in (teacher, student)]
    error, with_dead = logit_error(teacher, student, varied=True), logit_error(*padded, varied=True)
    assert with_dead > 0.5 * error


@pytest.mark.parametrize("offset", [0.0, checked(20.0), 200.0, checked(-200.0)])
def test_estimate_of_a_network_does_not_depend_on_an_offset(offset: float) -> None:
    """From capture to the estimate: the bias of the last layer is moved."""
    model = networks.make("Residual")
    student = quantize(model, networks.images(1), "w4a4", "quick", steps=4, seed=0)
    found = capture(model, networks.images(2))
    low = Offset(student.network, offset)
    with_offset = capture(Offset(model, offset), networks.images(2))
    estimate = measure_expected_drop(found, student.network, seed=1)
    other = measure_expected_drop(with_offset, low, seed=1)
    assert other.relative_error == pytest.approx(estimate.relative_error, rel=0.02)
    assert other.logit_error == pytest.approx(estimate.logit_error, rel=0.02)
    assert other.agreement == pytest.approx(estimate.agreement, abs=1)


class Offset(nn.Module):
    def __init__(self, network: nn.Module, offset: float) -> None:
        super().__init__()
        self.network, self.offset = network, offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        moved: torch.Tensor = self.network(x) + self.offset
        return moved


def test_estimate_takes_the_larger_error_of_two_kinds_of_images() -> None:
    teacher, student = _logits(3)
    alone = estimate_drop([teacher], [student], source="by hand")
    calm = estimate_drop([teacher], [student], source="by hand", on_noise=([teacher], [teacher]))
    assert calm == alone
    worse = teacher + 2 * (student - teacher)
    noisy = estimate_drop([teacher], [student], source="by hand", on_noise=([teacher], [worse]))
    assert noisy.relative_error == pytest.approx(2 * 100 * _relative(teacher, student))
    assert noisy.logit_error is not None
    assert alone.logit_error is not None
    assert noisy.logit_error > alone.logit_error
    assert noisy.agreement == alone.agreement


def _relative(teacher: torch.Tensor, student: torch.Tensor) -> float:
    centred = [x - x.mean(1, keepdim=True) for x in (teacher, student - teacher)]
    return float(centred[1].norm() / centred[0].norm())


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

    def recorded(
        source: Source, teacher: Captured, count: int, *, context: Context
    ) -> tuple[Tensor, Tensor | None]:
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
    [
        ("Detector", "not classes"),
        ("Transformer", "batch norms"),
        ("Audio", "take images"),
        ("Attention", "attention"),
        ("Embedding", "unit vectors"),
        ("Tags", "independent decisions"),
    ],
)
def test_estimate_is_absent_where_the_law_was_not_validated(name: str, reason: str) -> None:
    made = _MADE.get(name)
    shape = networks.SHAPE if made else networks.shape_of(name)
    model = nn.Sequential(networks.make("Residual"), made()) if made else networks.make(name)
    found = capture(model, networks.images(2, shape=shape))
    estimate = measure_expected_drop(found, found.network, seed=0)
    assert estimate.expected_drop is None
    assert estimate.interval is None
    assert reason in estimate.reason
    assert estimate.relative_error == 0.0


class Attention(nn.Module):
    """A network with a softmax inside."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weighted: torch.Tensor = self.head(x.softmax(1) * x)
        return weighted


class Unit(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(x)


_MADE = {"Attention": Attention, "Embedding": Unit, "Tags": nn.Sigmoid}

LOGITS = torch.eye(4).repeat(8, 1)
"""Logits of a teacher that predicts four classes in turn."""


def test_estimate_matches_hand_computed_numbers() -> None:
    student = LOGITS.clone()
    student[0] = LOGITS[1]  # one prediction of 32 differs
    estimate = estimate_drop([LOGITS], [student], source="by hand")
    assert (estimate.images, estimate.agreement) == (32, 100 * 31 / 32)
    # Centred rows of the identity have the power 3/4.
    assert estimate.relative_error == pytest.approx(100 * math.sqrt(2 / 32 / 0.75))
    # Two probabilities, e / (e + 3) and 1 / (e + 3), are exchanged.
    assert estimate.kl == pytest.approx((math.e - 1) / (math.e + 3) / 32, rel=1e-5)
    # With <c(y), c(ŷ)> = 24 − 1 of 24, the sine of the angle is √(1 − (23/24)²).
    x = math.sqrt(1 - (23 / 24) ** 2) * math.sqrt(math.log(4) / math.log(10))
    assert estimate.logit_error == pytest.approx(100 * x)
    assert estimate.expected_drop == pytest.approx(LAW.drop(x))
    assert estimate.reason == ""


@pytest.mark.parametrize(
    ("teacher", "student", "reason"),
    [
        (LOGITS, LOGITS * float("nan"), "not finite"),
        (LOGITS, LOGITS.roll(1, 1), "error of the student's logits"),
        (LOGITS[:1].expand(8, 4), LOGITS[:1].expand(8, 4), "same class"),
    ],
)
def test_estimate_is_absent_for_outputs_out_of_range(
    teacher: Tensor, student: Tensor, reason: str
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
