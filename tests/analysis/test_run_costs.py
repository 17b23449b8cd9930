"""Measured costs: a clock that is set by hand goes on where the work is done."""

from collections.abc import Callable
from dataclasses import asdict, replace
from statistics import fmean
from typing import Any

import pytest
import torch
from support.networks import Residual
from support.small_runs import small

from gdfq.analysis import run_costs
from gdfq.analysis.run_costs import Following, measure_costs
from gdfq.effort import Costs
from gdfq.errors import UsageError
from gdfq.execution.context import Context
from gdfq.execution.distributed import Group
from gdfq.functional.grid import Bits
from gdfq.graph.capture import Captured, capture
from gdfq.recipes import Recipe, find_recipe
from gdfq.sources.given import GivenImages
from gdfq.sources.pool import ImagePool, StoredImages
from gdfq.student.scheme import Scheme
from gdfq.tuning.moment_matching import matched_images

FULL = Scheme(Bits(4, 8), "full")


class Machine:
    """A machine whose work takes a known time, and its clock."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now, self._patch = 0.0, patch

    def __call__(self) -> float:
        return self.now

    def takes(self, function: str, seconds: Callable[..., float]) -> None:
        """Let a function take so many seconds, which may depend on its arguments."""
        module, _, name = f"gdfq.{function}".rpartition(".")
        real = getattr(__import__(module, fromlist=[name]), name)

        def slow(*args: Any, **kwargs: Any) -> Any:
            self.now += seconds(*args)
            return real(*args, **kwargs)

        self._patch.setattr(f"gdfq.{function}", slow)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine(monkeypatch)
    machine.takes("sources.spectral.check_images_finite", lambda *_: 0.4)
    machine.takes("sources.pixels.check_images_finite", lambda *_: 0.4)
    machine.takes("analysis.run_costs.channel_scales", lambda *_: 2.0)
    machine.takes("analysis.run_costs.build_student", lambda *_: 3.0)
    machine.takes("analysis.run_costs.calibrate_", lambda _, b: 0.5 + 0.125 * len(b[0]))
    machine.takes("analysis.run_costs.match_moments_", lambda s, t, x: 1 + 0.25 * len(x[0]))
    machine.takes("analysis.run_costs.freeze", lambda _: 5.0)
    machine.takes("tuning.distill.check_finite", lambda *_: 0.75)
    return machine


def measured(teacher: Captured, recipe: Recipe, machine: Machine, **options: Any) -> Costs:
    recipe = recipe.fitted(teacher.input_shape)
    return measure_costs(teacher, FULL, recipe, clock=machine, **options)


def test_each_part_is_measured_once(teacher: Captured, machine: Machine) -> None:
    """Batches of 8; 2 images show what calibration and moment matching take apart from images."""
    expected = Costs(
        fixed=2 + 3 + (0.5 + 0.125 * 2) + (1 + 0.25 * 2) + 5,
        iteration=0.4 / 8,
        calibration=0.5 + 0.125 * 8,
        matching=0.25 * 6,
        step=0.75,
        batch=8,
        calibrated=10,
        matched=fmean(matched_images(teacher.network.graph, 1024).values()) / 8,
        warmup=10,
    )
    costs = measured(teacher, small(find_recipe("fast")), machine)
    assert asdict(costs) == pytest.approx(asdict(expected))


def test_recipe_without_tuning_has_no_step(teacher: Captured, machine: Machine) -> None:
    costs = measured(teacher, small(find_recipe("zeroq")), machine)
    assert costs.step is None
    assert costs.iteration is None  # no pool: a batch has 5 iterations
    assert costs.draw == pytest.approx(5 * 0.4)


def test_generator_is_measured_by_its_batches(
    teacher: Captured, tiny: Recipe, machine: Machine
) -> None:
    machine.takes("sources.generator.check_finite", lambda *_, **__: 0.5)
    costs = measured(teacher, tiny, machine)
    assert costs.draw == pytest.approx(0.5)
    assert (costs.iteration, costs.step, costs.warmup) == (None, 0.75, 2)


def test_given_images_are_not_chosen(teacher: Captured, machine: Machine) -> None:
    stored = StoredImages(torch.zeros(40, 3, 8, 8), None, 8)
    fast = find_recipe("fast")
    recipe = replace(fast, source=ImagePool(stored, images=40, batch=8))
    costs = measured(teacher, recipe, machine)
    assert (costs.iteration, costs.draw) == (None, 0)
    assert costs.steps == 10**6
    untuned = replace(find_recipe("zeroq"), source=recipe.source).with_steps(3)
    costs = measured(teacher, untuned, machine)
    assert (costs.fewest, costs.steps) == (3, 3)  # as without a budget
    with pytest.raises(UsageError, match="real images and none were given"):
        measured(teacher, replace(fast, source=GivenImages(batch=8)), machine)


def test_mean_of_several_steps_is_taken_for_the_least_time(
    teacher: Captured, machine: Machine
) -> None:
    """Iterations take 0.1 s, 0.2 s, 0.3 s, ...: the second to the fourth last 0.9 s."""
    count = [0]

    def slower(*_: Any) -> float:
        count[0] += 1
        return 0.1 * count[0]

    machine.takes("sources.spectral.check_images_finite", lambda *a: slower(*a) - 0.4)
    costs = measured(teacher, small(find_recipe("fast")), machine, least=0.8)
    assert costs.iteration == pytest.approx(0.3 / 8)


def test_processes_share_images_and_steps(teacher: Captured, machine: Machine) -> None:
    class Four(Group):
        rank, size = 0, 4

    shards: list[int] = []
    machine.takes("tuning.distill.check_finite", lambda *_: 0.0)
    recipe = small(find_recipe("fast"))
    alone = measured(teacher, recipe, machine)
    real = type(recipe.tuning).seconds

    def seconds(self: Any, student: Any, teacher: Any, batch: Any, **options: Any) -> float:
        shards.append(len(batch))
        return real(self, student, teacher, batch, **options)

    machine._patch.setattr(type(recipe.tuning), "seconds", seconds)
    together = measured(teacher, recipe, machine, context=Context(group=Four()))
    assert alone.iteration is not None
    assert together.iteration == pytest.approx(alone.iteration / 4)
    assert shards == [2]


def test_what_follows_the_run_counts(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass takes 0.01 s for an image, in both networks."""
    teacher = capture(Residual().eval(), torch.zeros(1, 3, 8, 8))
    recipe = small(find_recipe("fast")).fitted((3, 8, 8))
    monkeypatch.setattr(run_costs, "_seconds_of_pass", lambda *_: 0.01)
    alone = measured(teacher, recipe, machine).fixed
    exported = Following(export=True, capture_seconds=2.0)
    assert measured(teacher, recipe, machine, following=exported).fixed == pytest.approx(
        alone + 2.7
    )
    reported = Following(report=True, capture_seconds=2.0)
    mixed, noise, examples, layers = 4 * 64, 64, 256, 3
    student = mixed + noise + 13 * 32
    passes = student + 5 * examples + layers * 32
    expected = 1.7 + 0.01 * (passes + student) + 30 * 64 * 0.4 / 8
    found = measured(teacher, recipe, machine, following=reported).fixed - alone
    assert found == pytest.approx(expected)


def test_measuring_changes_no_teacher(teacher: Captured) -> None:
    before = {key: value.clone() for key, value in teacher.network.state_dict().items()}
    recipe = small(find_recipe("fast")).fitted(teacher.input_shape)
    costs = measure_costs(teacher, FULL, recipe, following=Following(True, True, 1.0))
    assert costs.iteration is not None
    assert costs.step is not None
    assert min(costs.fixed, costs.iteration, costs.calibration, costs.step) > 0
    assert all(torch.equal(v, before[k]) for k, v in teacher.network.state_dict().items())
