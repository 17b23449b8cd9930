"""A run that is stopped anywhere resumes and ends with the same bits."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import networks
from support.choice import checked
from support.narrowing import present
from support.small_runs import same, small, state

import gdfq
from gdfq import RECIPES
from gdfq.execution.budget import MemoryBudget
from gdfq.execution.checkpoints import Checkpoints
from gdfq.execution.context import Context
from gdfq.execution.progress import Step
from gdfq.files.states import differences
from gdfq.graph.capture import Captured
from gdfq.plan.resolve import resolve
from gdfq.quantized import QuantizedNetwork
from gdfq.stages import environment_of, identity_of


class StopError(Exception):
    """Stands for anything that stops a run."""


Row = tuple[str, int, int, dict[str, float]]
"""Stage, step, number of steps, losses."""


class Recorder:
    """A listener that stops the run at its n-th call."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.rows: list[Row] = []
        self.calls, self.stop_at = 0, stop_at

    def __call__(self, step: Step) -> None:
        losses = {name: float(value) for name, value in step.losses.items()}
        self.rows.append((step.stage, step.index, step.total, losses))
        self.calls += 1
        if self.calls == self.stop_at:
            raise StopError


def told_once(rows: list[Row]) -> list[Row]:
    """The rows without those of batches that were repeated."""
    found: list[Row] = []
    for row in rows:
        while found and found[-1][0] == row[0] and found[-1][1] >= row[1]:
            found.pop()
        found.append(row)
    return found


CASES = {
    "fast": {"steps": 12},
    "quick": {"steps": 12},
    "patches": {"steps": 6},
    "paper": {"steps": 12},
    "paper-imagenet": {"steps": 12},
    "paper-separate": {"steps": 8},
    "paper-moving-statistics": {"steps": 8},
    "genie": {"steps": 5},
    "synq": {"steps": 8},
    "round": {"steps": 8},
    "zeroq": {"steps": 1},
    "real": {"steps": 8},
    "paper-real": {"steps": 8},
    "auto": {"steps": 4},
}
ONE_OF_EACH_KIND = {"fast", "patches", "paper", "genie", "zeroq", "real", "auto"}


def quantized(
    network: Captured, name: str, recorder: Recorder, checkpoints: Checkpoints | None = None
) -> QuantizedNetwork:
    options: dict[str, Any] = dict(CASES[name])
    if name in {"real", "paper-real"}:
        options["data"] = (networks.images(24), torch.arange(24) % 5)
    recipe = "fast" if name == "auto" else name
    bits = "auto" if name == "auto" else "w4a4"
    if name == "auto":
        options["size"] = 40_000
    return gdfq.quantize(
        network,
        networks.images(1),
        bits,
        small(RECIPES[recipe]),
        seed=3,
        listener=recorder,
        checkpoints=checkpoints,
        **options,
    )


@pytest.mark.parametrize("name", [n if n in ONE_OF_EACH_KIND else checked(n) for n in CASES])
def test_run_stopped_anywhere_ends_with_the_same_bits(
    name: str, teacher: Captured, tmp_path: Path
) -> None:
    whole = Recorder()
    expected = quantized(teacher, name, whole)
    rows: list[Row] = []
    stops = 0
    for calls in range(4, 100, 4):  # a batch that was not finished is made again from its start
        recorder = Recorder(stop_at=calls)
        try:
            got = quantized(teacher, name, recorder, Checkpoints(tmp_path))
        except StopError:
            stops += 1
            rows += recorder.rows
            continue
        rows += recorder.rows
        break
    assert stops
    assert same(state(expected.network), state(got.network))
    assert torch.equal(*expected.examples, *got.examples)
    assert expected.card == got.card
    assert torch.equal(present(expected.observations).images, present(got.observations).images)
    assert {**expected.metrics, "seconds": 0} == {**got.metrics, "seconds": 0}
    assert told_once(rows) == whole.rows


@pytest.mark.parametrize("changed", [{"group_size": 4}, {"new_biases": False}, {"denoiser": True}])
def test_run_of_another_scheme_is_another_run(teacher: Captured, changed: dict[str, Any]) -> None:
    plan = resolve(teacher, None, "w4a8", "quick")
    plan = replace(plan, scheme=replace(plan.scheme, placement="tokens"))
    other = replace(plan, scheme=replace(plan.scheme, **changed))
    (name,) = differences(identity_of(plan, Context()), identity_of(other, Context()))
    assert name in changed


def test_run_with_another_memory_rounds_in_another_way(teacher: Captured) -> None:
    plan = resolve(teacher, None, "w4a8", "quick")
    usual, small_one = Context(), Context(memory=MemoryBudget(2**20))
    assert differences(identity_of(plan, usual), identity_of(plan, small_one)) == {}
    found = differences(environment_of(plan, usual), environment_of(plan, small_one))
    assert found == {"memory": (None, 2**20)}
