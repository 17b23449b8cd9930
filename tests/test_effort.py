"""The effort that fits into a time: by hand, and properties that hold for all measurements."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.narrowing import present

from gdfq.effort import Costs, Effort, EffortRule, effort_within
from gdfq.errors import UsageError
from gdfq.execution.distributed import Group
from gdfq.plan.method import resolve_method
from gdfq.recipes import PAPER, effort_rule, find_recipe

RULE = EffortRule(
    min_images=32,
    many_images=128,
    max_images=128,
    min_iterations=10,
    max_iterations=20,
    image_share=0.5,
    min_steps=4,
    used_share=1.0,
)
COSTS = Costs(fixed=10.0, iteration=0.001, calibration=1.0, step=0.5, calibrated=2, warmup=2)


def test_rule_spreads_iterations_over_the_logarithm_of_images() -> None:
    assert [RULE.iterations(n) for n in (32, 64, 96, 128)] == [10, 15, 18, 20]
    assert RULE.with_iterations(7).iterations(96) == 7
    assert RULE.limited(32).iterations(32) == 20
    assert RULE.limited(16) == replace(RULE, min_images=16, many_images=16, max_images=16)
    assert replace(RULE, max_images=512).iterations(160) == 20


def test_seconds_are_the_sum_of_all_parts() -> None:
    """10 fixed, 64 images of 15.5 passes of 1 ms, 2 calibrating batches, 20 − 2 updates."""
    assert COSTS.seconds(Effort(64, 15, 20)) == pytest.approx(10 + 0.992 + 2 + 9)
    assert COSTS.seconds(Effort(64, 15, 4)) == pytest.approx(10 + 0.992 + 1 + 1.5)  # a quarter
    matched = replace(COSTS, matching=3.0, matched=1.5)
    assert matched.seconds(Effort(64, 15, 20)) == pytest.approx(21.992 + 4.5)


def test_seconds_without_tuning_calibrate_on_all_steps() -> None:
    costs = Costs(fixed=1.0, iteration=0.001, calibration=2.0, batch=32)
    assert costs.seconds(Effort(96, 10, 3)) == pytest.approx(1 + 1.008 + 6)
    assert costs.seconds(Effort(48, 10, 2)) == pytest.approx(1 + 0.504 + 3)  # two of 24


def test_seconds_of_a_source_without_a_pool_are_those_of_its_batches() -> None:
    costs = Costs(fixed=1.0, draw=0.25, calibration=1.0, step=0.5, calibrated=1, warmup=2)
    assert costs.seconds(Effort(None, None, 20)) == pytest.approx(1 + 5 + 1 + 9)


def test_images_take_their_share_and_steps_the_rest() -> None:
    """Beside the fixed 10 s there are 14.4 s, of which 7.2 s for images.

    128 images of 20 iterations take 2.624 s. The other 24.4 − 10 − 2.624 s are 2 s of calibration
    and 19 updates, after 2 steps of warm-up.
    """
    assert effort_within(24.4, COSTS, RULE) == Effort(128, 20, 21)
    slow = replace(COSTS, iteration=0.004)  # 96 images take 7.104 s, 128 take 10.496
    assert effort_within(24.4, slow, RULE) == Effort(96, 18, 12)


def test_time_for_which_images_may_not_be_seen_makes_more_images() -> None:
    """Steps of 32 images, each seen 4 times at most: a step for each 8 images.

    Images are slow here: their share is for the fewest. 32 of them take 10.336 s with the fixed
    part. The rest of 15.5 s is enough for 8 steps: 2 that calibrate (2 s) and 6 updates (3 s); but
    4 are allowed. 64 images take 10.992 s. The rest is enough for 7 steps, one of which calibrates
    (1 s) and 6 are updates (3 s), and 8 are allowed: so these are chosen.
    """
    rule = replace(RULE, max_views=4, image_share=0.05)
    costs = replace(COSTS, batch=32)
    assert effort_within(15.5, costs, replace(rule, max_views=None)) == Effort(32, 10, 8)
    assert effort_within(15.5, costs, rule) == Effort(64, 15, 7)
    assert effort_within(1e6, costs, rule) == Effort(128, 20, 16)


def test_short_time_makes_images_and_does_not_tune() -> None:
    """64 images and 8 steps of 32 images: 10 + 0.992 + 2 + 3 s. Images alone calibrate in 1 s for 32."""
    rule = replace(RULE, tuned_images=64, tuned_steps=8, untuned_images=64)
    costs = replace(COSTS, batch=32)
    assert effort_within(16.0, costs, rule) == Effort(64, 15, 8)
    assert effort_within(15.9, costs, rule) == Effort(64, 15, 0)  # 12.992 s; 96 are for tuning
    assert effort_within(12.9, costs, rule) == Effort(32, 10, 0)  # 11.336 s
    assert costs.seconds(Effort(32, 10, 0)) == pytest.approx(11.336)
    with pytest.raises(UsageError, match="at least 12 s"):
        effort_within(11.3, costs, rule)
    fewer = replace(rule, untuned_images=32)
    assert effort_within(15.9, costs, fewer) == Effort(32, 10, 0)  # more would be of no use
    given = replace(costs, iteration=None)  # images that are given are tuned on at once
    assert effort_within(13.0, given, rule) == effort_within(13.0, given, RULE)
    few = rule.limited(40)  # of a large input: 32 images are enough
    assert (few.tuned_images, few.tuned_steps, few.untuned_images) == (32, 8, 40)
    assert effort_within(20.0, costs, few).images == 32


def test_used_share_is_left_for_what_is_not_measured() -> None:
    whole = effort_within(24.4, COSTS, RULE)
    assert effort_within(24.4 / 0.8, COSTS, replace(RULE, used_share=0.8)) == whole


def test_all_time_goes_into_images_without_tuning_up_to_the_cap() -> None:
    """Steps of at most 64 images calibrate with each image once, at 0.1 s for 64 images."""
    costs = Costs(fixed=1.0, iteration=0.001, calibration=0.1, batch=64)
    assert effort_within(1.5, costs, RULE) == Effort(32, 10, 1)
    assert effort_within(2.1, costs, RULE) == Effort(64, 15, 1)  # 1 + 0.992 + 0.1
    assert effort_within(2.93, costs, RULE) == Effort(96, 18, 2)  # 1 + 1.776 + 0.15
    assert effort_within(3.9, costs, RULE) == Effort(128, 20, 2)  # 1 + 2.624 + 0.2
    assert effort_within(1e6, costs, RULE) == Effort(128, 20, 2)


def test_source_without_a_pool_chooses_steps_alone() -> None:
    assert effort_within(20.0, replace(COSTS, iteration=None), RULE) == Effort(None, None, 18)
    untuned = Costs(fixed=1.0, draw=1.0, calibration=1.0)
    assert effort_within(8.0, untuned, RULE) == Effort(None, None, 3)
    assert effort_within(8.0, replace(untuned, steps=2), RULE) == Effort(None, None, 2)


def test_budget_below_the_least_effort_is_refused_with_the_least() -> None:
    """10 + 32 · 10.5 ms + 1 + 1.5 s."""
    with pytest.raises(UsageError, match=r"at least 13 s .* of which 10 s .*; got 12 s"):
        effort_within(12.0, COSTS, RULE)
    assert effort_within(13.0, COSTS, RULE).images == 32
    with pytest.raises(UsageError, match="at least 26 s"):
        effort_within(25.0, COSTS, replace(RULE, used_share=0.5))


seconds = st.floats(1e-4, 10.0)
rules = st.builds(
    lambda fewest, many, most, low, more, share, views, steps, tuned, late, rest: EffortRule(
        *(fewest, fewest * many, fewest * many * most, low, low + more, share, views, steps, 0.97),
        *(min(tuned, fewest * many * most), late, min(rest, tuned, fewest * many * most)),
    ),
    *(st.integers(1, 40), st.integers(1, 8), st.integers(1, 8)),
    *(st.integers(1, 30), st.integers(0, 30)),
    *(st.floats(0.05, 0.95), st.none() | st.integers(1, 100), st.integers(4, 40)),
    *(st.integers(1, 500), st.integers(4, 200), st.integers(0, 500)),
)
costs_of_any_run = st.builds(
    Costs,
    fixed=st.floats(0.0, 100.0),
    iteration=st.none() | seconds,
    draw=st.just(0.0) | seconds,
    calibration=seconds,
    matching=st.just(0.0) | seconds,
    step=st.none() | seconds,
    batch=st.integers(1, 256),
    calibrated=st.integers(1, 1000),
    matched=st.floats(0.0, 50.0),
    warmup=st.integers(1, 1000),
)


def within(budget: float, costs: Costs, rule: EffortRule) -> Effort | None:
    try:
        return effort_within(budget, costs, rule)
    except UsageError:
        return None


@given(costs_of_any_run, rules, st.floats(0.1, 1e5))
def test_effort_is_within_the_budget_and_at_least_the_minimum(
    costs: Costs, rule: EffortRule, budget: float
) -> None:
    effort = within(budget, costs, rule)
    if effort is None:
        return
    assert costs.seconds(effort) <= rule.used_share * budget
    if not effort.steps:
        assert costs.step is not None
        assert 0 < present(effort.images) <= max(rule.min_images, rule.untuned_images)
        assert rule.untuned_images
    elif costs.step is None:
        assert effort.steps >= 1
    elif costs.iteration is None:
        assert effort.steps >= rule.min_steps
    else:
        assert effort.steps >= rule.tuned_steps
        assert present(effort.images) >= rule.tuned_images
    if costs.iteration is None:
        assert (effort.images, effort.iterations) == (None, None)
        return
    assert effort.images is not None
    assert effort.iterations is not None
    assert effort.images <= rule.max_images
    assert rule.min_iterations <= effort.iterations <= rule.max_iterations


@given(costs_of_any_run, rules, st.floats(0.1, 1e5), st.floats(1.0, 100.0))
def test_more_time_never_gives_less(
    costs: Costs, rule: EffortRule, budget: float, factor: float
) -> None:
    """Fewer steps are possible, where there are more images."""
    less, more = (within(b, costs, rule) for b in (budget, factor * budget))
    if less is None:
        return
    assert more is not None
    if less.images is not None and less.iterations is not None:
        assert more.images is not None
        assert more.iterations is not None
        assert more.images >= less.images
        assert more.iterations >= less.iterations
    assert more.steps >= less.steps or (more.images or 0) > (less.images or 0)


@given(costs_of_any_run, rules, st.floats(0.1, 1e5))
def test_one_more_step_of_a_tuned_student_does_not_fit(
    costs: Costs, rule: EffortRule, budget: float
) -> None:
    effort = within(budget, costs, rule)
    if effort is None or costs.step is None or not effort.steps:
        return
    if effort.steps >= min(costs.steps, rule.max_steps(effort.images, costs.batch)):
        return
    more = costs.seconds(replace(effort, steps=effort.steps + 1))
    assert more > rule.used_share * budget


def test_processes_agree_on_the_measurements_of_the_first() -> None:
    class Second(Group):
        """A process that hears of another one that has measured 1, 2, 3, ..."""

        rank, size = 1, 2

        def broadcast(self, rank: int, x: torch.Tensor) -> torch.Tensor:
            assert rank == 0
            return torch.arange(1.0, len(x) + 1, dtype=x.dtype)

    found = COSTS.agreed(Second(), torch.device("cpu"))
    assert (found.fixed, found.iteration, found.draw) == (1, 2, 3)
    assert (found.calibration, found.matching, found.step) == (4, 5, 6)
    assert replace(COSTS, step=None).agreed(Second(), torch.device("cpu")).step is None


def test_rule_of_a_recipe_knows_its_iterations_and_the_size_of_its_input() -> None:
    small, large, huge = (3, 32, 32), (3, 224, 224), (3, 1024, 1024)
    fast = find_recipe("fast")
    assert effort_rule(fast, small).max_images == 4096
    assert effort_rule(fast, large).max_images == 1312
    assert effort_rule(fast, huge).max_images == 64  # 2^26 pixels
    assert effort_rule(fast, small).min_iterations == 10
    eight_bits = resolve_method("w8a8").recipe
    assert effort_rule(eight_bits, small).max_images == 1024
    assert effort_rule(eight_bits, small).max_views is None
    four_bits, three_bits = (effort_rule(resolve_method(b).recipe, small) for b in ("w4a4", "w3a3"))
    assert (four_bits.tuned_images, four_bits.tuned_steps) == (512, 80)
    assert (three_bits.tuned_images, three_bits.tuned_steps) == (1, 4)
    four_bit_rules = [effort_rule(resolve_method("w4a4").recipe, s) for s in (small, large, huge)]
    assert [rule.untuned_images for rule in four_bit_rules] == [512, 256, 12]
    assert [rule.tuned_images for rule in four_bit_rules] == [512, 512, 64]
    patches = effort_rule(find_recipe("patches"), large)
    assert (patches.min_iterations, patches.max_iterations) == (60, 60)
    assert effort_rule(PAPER, small) == effort_rule(find_recipe("zeroq"), small)


def test_effort_in_words() -> None:
    assert str(Effort(256, 18, 400)) == "256 images of 18 iterations, 400 steps"
    assert str(Effort(None, None, 1)) == "1 step"
    assert str(Effort(1, 1, 4)) == "1 image of 1 iteration, 4 steps"
