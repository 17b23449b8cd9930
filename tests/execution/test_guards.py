"""Errors of a run say what to do, and finished work is kept."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import networks
from support.small_runs import same, small, state
from torch import Tensor

import gdfq
from gdfq import RECIPES, GdfqError
from gdfq.execution.checkpoints import Checkpoints
from gdfq.execution.guards import batch_that_fits_suggested, smaller_budget_suggested
from gdfq.functional import losses
from gdfq.graph.capture import Captured
from gdfq.recipes import Recipe
from gdfq.sources.pool import ImagePool
from gdfq.sources.spectral import SpectralSource

CPU_SHORT = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 99999999999 bytes. Error code 12 (Cannot allocate memory)"
)


SHORTAGES = [MemoryError(), torch.OutOfMemoryError("CUDA out of memory."), CPU_SHORT]


@pytest.mark.parametrize("error", SHORTAGES, ids=["python", "gpu", "cpu"])
@pytest.mark.parametrize(
    ("room", "advice"),
    [(100, r"50 images fit: .*another folder.*--batch 50 "), (1, "not even one image fits")],
)
def test_out_of_memory_error_names_a_batch_that_fits(
    error: BaseException, room: int, advice: str
) -> None:
    asked: list[int] = []

    def ask(images: int) -> None:
        asked.append(images)
        if images > room:
            raise error

    with pytest.raises(GdfqError, match=f"(?s)a step on 200 images must fit.*{advice}"):  # noqa: SIM117
        with batch_that_fits_suggested(200, ask):
            raise error
    assert asked[:2] == [200, 100]


@pytest.mark.parametrize("error", SHORTAGES, ids=["python", "gpu", "cpu"])
def test_out_of_memory_error_names_a_smaller_budget(error: BaseException) -> None:
    with pytest.raises(GdfqError, match=r"making images must fit.*--memory 512MiB "):  # noqa: SIM117
        with smaller_budget_suggested("making images", 2**30):
            raise error
    with pytest.raises(RuntimeError, match="shapes"), smaller_budget_suggested("evaluating", 1):
        raise RuntimeError("shapes cannot be multiplied")


def test_out_of_memory_in_evaluation_suggests_a_smaller_budget(
    teacher: Captured, tiny: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(*_: object, **__: object) -> None:
        raise CPU_SHORT

    result = gdfq.quantize(teacher, networks.images(1), "w4a4", tiny)
    data = (networks.images(4), torch.zeros(4, dtype=torch.long))
    monkeypatch.setattr("gdfq.analysis.accuracy._batches", short)
    with pytest.raises(GdfqError, match=r"evaluating must fit.*--memory 640MiB "):
        result.evaluate(data)
    with pytest.raises(GdfqError, match=r"measuring on the test images must fit.*--memory 1MiB "):
        gdfq.quantize(teacher, networks.images(1), "w4a4", tiny, test=data, memory="2MiB")


def test_other_errors_are_not_reported_as_out_of_memory() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2"), batch_that_fits_suggested(8, print):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


def test_out_of_memory_in_tuning_suggests_a_smaller_batch(
    teacher: Captured, tiny: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(self: Any, *_: object) -> None:
        raise CPU_SHORT

    monkeypatch.setattr("gdfq.tuning.distill.Distillation.losses", short)
    with pytest.raises(GdfqError, match=r"a step on 8 images.*4 images fit: .*--batch 4 "):
        gdfq.quantize(teacher, networks.images(1), "w4a4", tiny)


def test_out_of_memory_in_a_pool_suggests_a_smaller_batch(
    teacher: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(*_: object) -> None:
        raise CPU_SHORT

    monkeypatch.setattr("gdfq.sources.spectral.focal_loss", short)
    recipe = replace(RECIPES["fast"].with_steps(4), source=ImagePool(SpectralSource(batch=9), 9, 3))
    with pytest.raises(GdfqError, match=r"a step on 9 images.*4 images fit: .*--batch 4 "):
        gdfq.quantize(teacher, networks.images(1), "w4a4", recipe)


@pytest.mark.parametrize(
    ("name", "where", "message"),
    [
        (
            "paper",
            "gdfq.sources.generator.batch_norm_statistics_loss",
            "generator's.*step 0.*bns nan",
        ),
        (
            "fast",
            "gdfq.sources.spectral.relative_statistics_loss",
            "image's.*iteration 0 of batch 0",
        ),
        (
            "synq",
            "gdfq.sources.pixels.standard_deviation_loss",
            "image's.*iteration 0 of batch 0",
        ),
        ("genie", "gdfq.sources.latent.standard_deviation_loss", "image's.*bns nan"),
        ("fast", "gdfq.tuning.distill.distillation_loss", "student's.*step 2.*kd nan"),
    ],
)
def test_loss_that_is_not_finite_stops_the_run(
    name: str, where: str, message: str, teacher: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, function = where.rsplit(".", 1)
    original = getattr(__import__(module, fromlist=[function]), function)
    monkeypatch.setattr(where, lambda *args: original(*args) * torch.nan)
    heard = []
    with pytest.raises(GdfqError, match=f"(?s){message}"):
        gdfq.quantize(
            teacher, networks.images(1), "w4a4", small(RECIPES[name]), steps=8,
            listener=lambda step: heard.append(step.stage),
        )  # fmt: skip
    assert "tune" not in heard


def test_run_resumes_from_the_last_finite_state(
    teacher: Captured, tiny: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The loss becomes NaN late; the checkpoint before it resumes once the cause is removed."""
    from gdfq.tuning import distill

    expected = gdfq.quantize(teacher, networks.images(1), "w4a4", tiny)
    original, calls = losses.distillation_loss, []

    def late(*args: Any) -> Tensor:
        calls.append(1)
        return original(*args) * (torch.nan if len(calls) == 4 else 1)

    with monkeypatch.context() as patch:
        patch.setattr(distill, "distillation_loss", late)
        with pytest.raises(GdfqError, match="at step 5"):
            gdfq.quantize(
                teacher, networks.images(1), "w4a4", tiny, checkpoints=Checkpoints(tmp_path)
            )
    again = gdfq.quantize(teacher, networks.images(1), "w4a4", tiny, checkpoints=tmp_path)
    assert same(state(again.network), state(expected.network))
