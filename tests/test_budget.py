"""A time budget: chosen once, in the plan; repeated by options; recorded for a run that resumes."""

import json
import os
import re
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import networks
from support.command_line import arguments
from support.narrowing import instance, present
from support.small_runs import same, small, state

import gdfq
from gdfq import RECIPES, UsageError
from gdfq.cli import main
from gdfq.effort import Costs, Effort
from gdfq.execution.checkpoints import Checkpoints
from gdfq.execution.listeners import History
from gdfq.execution.progress import Step
from gdfq.graph.capture import Captured, capture
from gdfq.plan.plan import Plan, Timing
from gdfq.plan.resolve import resolve
from gdfq.recipes import Recipe
from gdfq.sources.pool import ImagePool

COSTS = Costs(
    fixed=1.0, iteration=0.01, calibration=0.1, step=0.5, batch=8, calibrated=10, warmup=10
)


_HOUR_LEAST = 0.02 * 3600


@pytest.fixture
def measurements(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Measured costs are `COSTS`, of an hour 100 times those; returns the options of each call."""
    calls: list[dict[str, Any]] = []

    def measured(*_: Any, **options: Any) -> Costs:
        calls.append(options)
        slower = 100 if options["least"] == _HOUR_LEAST else 1
        return replace(COSTS, iteration=0.01 * slower, step=0.5 * slower)

    monkeypatch.setattr("gdfq.plan.budget.measure_costs", measured)
    return calls


@pytest.fixture
def fast() -> Recipe:
    return small(RECIPES["fast"])


def planned(teacher: Captured, recipe: str | Recipe, **options: Any) -> Plan:
    return resolve(teacher, None, "w4a8", recipe, **options)


def test_plan_has_the_effort_of_its_budget(
    teacher: Captured, measurements: list[dict[str, Any]], fast: Recipe
) -> None:
    started = time.perf_counter() - 100
    plan = planned(teacher, fast, budget="2m30s", timing=Timing(started))
    (options,) = measurements
    assert options["least"] == pytest.approx(0.02 * 150)
    assert plan.budget == 150
    spent = present(plan.planned_seconds)
    assert 0.96 * 150 < spent <= 0.97 * 150
    pool = instance(plan.source, ImagePool)
    images, iterations, steps = plan.effort.images, plan.effort.iterations, plan.effort.steps
    assert (pool.images, pool.source.iterations, plan.recipe.steps) == (images, iterations, steps)
    assert plan.as_values()["effort"] == {
        "images": images,
        "iterations": iterations,
        "steps": steps,
    }
    assert plan.as_values()["budget"] == 150
    # 100 s have passed and 1 s is fixed: 44.5 s remain, a third of them for images.
    assert 0.01 * present(images) * (present(iterations) + 0.5) <= 44.5 / 3
    assert 0.5 * (steps - 10) < 44.5


def test_budget_and_the_effort_that_it_chose_give_the_same_bits(
    teacher: Captured, measurements: list[dict[str, Any]], fast: Recipe
) -> None:
    fast = replace(fast, name="fast")
    del measurements
    first = gdfq.quantize(teacher, None, "w4a8", fast, budget=9.7)
    effort = first.metrics["effort"]
    assert effort["images"] == 32
    again = gdfq.quantize(teacher, None, "w4a8", fast, **effort)
    assert same(state(first.network), state(again.network))
    assert again.metrics["effort"] == effort


def test_at_8_bits_all_images_calibrate_once(
    teacher: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "gdfq.plan.budget.measure_costs",
        lambda *_, **__: Costs(fixed=100.0, iteration=0.1, calibration=10.0, batch=128),
    )
    plan = resolve(teacher, None, "w8a8", "fast", budget=1050)
    assert plan.effort == Effort(416, 20, 4)  # 100 + 852.8 + 32.5 s
    assert instance(plan.source, ImagePool).batch == 104
    assert (plan.recipe.calibration, plan.recipe.tuning.trains) == (4, False)
    capped = resolve(teacher, None, "w8a8", "fast", budget=100_000)
    assert capped.effort == Effort(1024, 24, 8)
    assert present(capped.planned_seconds) < 3000
    again = resolve(teacher, None, "w8a8", "fast", images=416, iterations=20)
    assert again.recipe == plan.recipe


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 8}, "chooses images, iterations and steps; steps was given"),
        ({"images": 8, "iterations": 2}, "images, iterations were given, too. Remove them"),
        ({"bits": "auto", "size": 10**6}, "a budget needs the bits"),
        ({"budget": "5 parsecs"}, "positive time, such as 90s"),
        ({"budget": -1}, "positive time, such as 90s"),
    ],
)
def test_budget_is_refused_before_a_network_is_loaded(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        gdfq.quantize("no/such/file.py:net", **{"budget": 5, **options})


def test_small_budget_is_refused_with_the_least(
    teacher: Captured, measurements: list[dict[str, Any]], fast: Recipe
) -> None:
    del measurements
    with pytest.raises(UsageError, match=r"at least 7 s .* got 2 s"):
        planned(teacher, fast, budget=2)


def test_images_and_iterations_change_the_pool(teacher: Captured, fast: Recipe) -> None:
    """24 images in batches of 8; 20 are 3 batches of 7, of which the last one is cut."""
    pool = instance(planned(teacher, fast, images=20, iterations=3).source, ImagePool)
    made = pool.source
    assert (pool.images, made.batch, made.iterations, pool.batch) == (20, 7, 3, 8)
    assert planned(teacher, fast, iterations=5).source == planned(teacher, fast).source


@pytest.mark.parametrize("options", [{"images": 0}, {"iterations": 0}, {"images": 1.5}])
def test_images_and_iterations_are_positive_numbers(
    teacher: Captured, fast: Recipe, options: dict[str, Any]
) -> None:
    with pytest.raises(UsageError, match="whole number of at least 1"):
        planned(teacher, fast, **options)


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        ("paper", {"images": 8}, "recipes with a pool"),
        ("paper", {"iterations": 8}, "images that are optimised"),
        ("zeroq", {"images": 8}, "recipes with a pool"),
        ("real", {"images": 8}, r"give with --data .*got images 8\."),
    ],
)
def test_images_are_refused_by_recipes_that_make_none_beforehand(
    teacher: Captured, recipe: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        planned(teacher, recipe, **options)


def test_images_are_refused_with_data(teacher: Captured, fast: Recipe) -> None:
    with pytest.raises(UsageError, match="real ones were given"):
        planned(teacher, fast, images=8, data=networks.images(16))


def test_stopped_run_resumes_with_the_effort_that_it_started_with(
    teacher: Captured,
    measurements: list[dict[str, Any]],
    fast: Recipe,
    tmp_path: Path,
) -> None:
    class StoppedError(Exception):
        pass

    def stop(step: Step) -> None:
        if step.stage == "tune":
            raise StoppedError

    def quantize(**options: Any) -> Any:
        return gdfq.quantize(
            teacher, None, "w4a8", fast, checkpoints=tmp_path, **{"budget": 9.7, **options}
        )

    with pytest.raises(StoppedError):
        quantize(listener=stop)
    with pytest.raises(UsageError, match=r"its budget was 9\.7 s and is 20\.0 s"):
        quantize(budget=20)
    resumed = quantize()
    assert len(measurements) == 1
    whole = gdfq.quantize(teacher, None, "w4a8", fast, **resumed.metrics["effort"])
    assert same(state(resumed.network), state(whole.network))


def command(place: Path, *more: str) -> list[str]:
    words = arguments(place, *more)
    at = words.index("--recipe")
    return [*words[:at], "--recipe", "fast", "--bits", "w3a3", *words[at + 4 :]]


@pytest.mark.parametrize(
    ("bits", "recipe", "step"),
    [("w8a8", "fast", None), ("w4a4", "quick", None), ("w4a4", "fast", 0.5)],
)
def test_effort_of_a_run_without_tuning_has_no_steps_and_repeats_it(
    teacher: Captured, monkeypatch: pytest.MonkeyPatch, bits: str, recipe: str, step: float | None
) -> None:
    """With steps the recipe would tune; at w4a4 the time is too short for it."""
    costs = Costs(fixed=1.0, iteration=0.01, calibration=0.1, step=step, batch=128)
    monkeypatch.setattr("gdfq.plan.budget.measure_costs", lambda *_, **__: costs)
    first = gdfq.quantize(teacher, None, bits, recipe, budget=6)
    effort = first.metrics["effort"]
    assert effort == {"images": 32, "iterations": 10, "steps": 0}
    again = gdfq.quantize(teacher, None, bits, recipe, **effort)
    assert same(state(first.network), state(again.network))
    assert again.metrics["effort"] == effort


def test_run_on_large_images_is_repeated_without_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipe fast makes fewer images of 224x224, in smaller batches."""
    costs = Costs(fixed=1.0, iteration=0.01, calibration=0.1, step=0.5, batch=32)
    monkeypatch.setattr("gdfq.plan.budget.measure_costs", lambda *_, **__: costs)
    teacher = capture(networks.make("Residual"), torch.zeros(1, 3, 224, 224))
    plan = resolve(teacher, None, "w4a4", "fast", budget=60)
    # More images are of no use without tuning.
    assert plan.effort_options == {"images": 256, "iterations": 18, "steps": 0}
    again = resolve(teacher, None, "w4a4", "fast", images=256, iterations=18, steps=0)
    assert again.recipe == plan.recipe
    quick = resolve(teacher, None, "w4a4", "quick", images=256, iterations=18).recipe
    assert plan.recipe == replace(quick, name="fast", summary=plan.recipe.summary)
    tuned = resolve(teacher, None, "w4a4", "fast", budget=600)
    assert present(tuned.effort.images) >= 512
    assert tuned.effort.steps >= 80


def test_budget_of_given_images_chooses_steps_alone(
    teacher: Captured, monkeypatch: pytest.MonkeyPatch, fast: Recipe
) -> None:
    """Of 20 steps 5 calibrate: 1 s + 0.5 s + 7.5 s of the 9.4 s that are planned."""
    costs = replace(COSTS, iteration=None)
    monkeypatch.setattr("gdfq.plan.budget.measure_costs", lambda *_, **__: costs)
    plan = planned(teacher, fast, budget=9.7, data=networks.images(16))
    assert plan.effort_options == {"images": None, "iterations": None, "steps": 20}


def test_budget_of_given_images_without_tuning_chooses_nothing(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """16 of the 40 images calibrate in each of its four steps, as without a budget."""
    words = arguments(place, "--data", f"{place}/bare.npz", "--batch", "16")
    at = words.index("--recipe")
    words = [*words[:at], "--recipe", "quick", "--bits", "w4a4", *words[at + 4 :]]
    assert main([*words, "--budget", "1h"]) == 0
    said = capsys.readouterr().out
    assert "effort    calibrated without tuning" in said
    assert said.splitlines()[-1].endswith("the same run: --steps 0")
    metrics = json.loads((place / "out" / "metrics.json").read_text())
    assert metrics["effort"] == {"images": None, "iterations": None, "steps": 0}
    first = (place / "out" / "student.safetensors").read_bytes()
    assert main([word.replace(f"{place}/out", f"{place}/again") for word in words]) == 0
    assert (place / "again" / "student.safetensors").read_bytes() == first


def test_command_records_and_says_what_was_chosen(
    place: Path, measurements: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(place, "--budget", "1h", "--recipe", "fast")) == 0
    (options,) = measurements
    following = options["following"]
    assert (following.export, following.report) == (True, False)
    assert following.capture_seconds > 0
    captured = capsys.readouterr()
    config = json.loads((place / "out" / "config.json").read_text())
    effort = Effort(**config["effort"])
    assert config["budget"] == 3600
    assert f"effort    {effort}, about 3" in captured.out
    assert "of 1:00:00 left" in captured.err
    repeated = f"--images {effort.images} --iterations {effort.iterations} --steps {effort.steps}"
    assert f"s of 3600 s; the same run: {repeated}" in captured.out.splitlines()[-1]
    assert json.loads((place / "out" / "metrics.json").read_text())["effort"] == config["effort"]


def test_stopped_command_resumes_with_its_effort_and_time(
    place: Path,
    measurements: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Stops(History):
        def __call__(self, step: Step) -> None:
            super().__call__(step)
            if step.stage == "tune":
                os.kill(os.getpid(), signal.SIGTERM)

    words = command(place, "--budget", "1h")
    with monkeypatch.context() as patch:
        patch.setattr("gdfq.cli.quantize.History", Stops)
        assert main(words) == 143
    used = present(Checkpoints(place / "out" / "checkpoints").recorded("countdown"))["used"]
    assert used > 0
    config = json.loads((place / "out" / "config.json").read_text())
    capsys.readouterr()
    assert main(words) == 0
    assert len(measurements) == 1
    said = capsys.readouterr().out
    assert f"effort    {Effort(**config['effort'])}\n" in said
    assert int(re.findall(r"budget +(\d+) s of 3600 s", said)[0]) >= int(used)
    assert json.loads((place / "out" / "metrics.json").read_text())["effort"] == config["effort"]


def test_command_refuses_a_budget_with_steps(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(place, "--budget", "12s")) == 2
    assert "steps was given, too. Remove it or the budget" in capsys.readouterr().err
    assert main(arguments(place, "--budget", "12s", "--images", "8")) == 2
    assert "steps, images were given, too. Remove them or" in capsys.readouterr().err
    assert main(command(place, "--budget", "soon")) == 2
    assert "such as 90s, 5m, 2m30s" in capsys.readouterr().err
    assert not (place / "out").exists()


def test_doctor_says_what_a_budget_chooses(
    place: Path, measurements: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["doctor", f"{place}/net.py:factory", "--input", "3x8x8", "--bits", "w4a8"]
    assert main([*words, "--budget", "1h", "--json"]) == 0
    (options,) = measurements
    assert (options["following"].export, options["following"].report) == (True, True)
    facts = json.loads(capsys.readouterr().out)
    assert facts["effort"].startswith("64 images of 13 iterations, ")
    assert facts["budget"].endswith("s of 3600 s")
    assert main([*words, "--budget", "1h"]) == 0
    assert "s of 3600 s" in capsys.readouterr().out


@pytest.mark.check
def test_real_measurements_choose_an_effort(teacher: Captured, fast: Recipe) -> None:
    """Nothing is replaced here; ten minutes are enough on any machine."""
    effort = planned(teacher, fast, budget="10m").effort
    assert effort.images is not None
    assert 32 <= effort.images <= 4096
    assert effort.steps >= 4
