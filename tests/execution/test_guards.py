"""What goes wrong is told, and nothing that was finished is lost."""

import errno
import json
import os
from dataclasses import replace

import pytest
import torch
from support import networks
from support.command_line import arguments
from support.small_runs import same, small, state

import gdfq
from gdfq import RECIPES, GdfqError
from gdfq.cli import main
from gdfq.errors import GdfqWarning
from gdfq.execution.checkpoints import Checkpoints
from gdfq.execution.guards import batch_that_fits_suggested, smaller_budget_suggested
from gdfq.execution.listeners import History
from gdfq.sources.collapse import CollapsedError, CollapseWatch, symptom_of
from gdfq.sources.generator import GeneratorSource
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
def test_a_shortage_names_a_batch_that_fits(error, room, advice):
    asked = []

    def ask(images):
        asked.append(images)
        if images > room:
            raise error

    with pytest.raises(GdfqError, match=f"(?s)a step on 200 images must fit.*{advice}"):  # noqa: SIM117
        with batch_that_fits_suggested(200, ask):
            raise error
    assert asked[:2] == [200, 100]


@pytest.mark.parametrize("error", SHORTAGES, ids=["python", "gpu", "cpu"])
def test_a_shortage_of_any_stage_names_a_smaller_budget(error):
    with pytest.raises(GdfqError, match=r"making images must fit.*--memory 512MiB "):  # noqa: SIM117
        with smaller_budget_suggested("making images", 2**30):
            raise error
    with pytest.raises(RuntimeError, match="shapes"), smaller_budget_suggested("evaluating", 1):
        raise RuntimeError("shapes cannot be multiplied")


def test_evaluating_that_is_short_of_memory_says_so(teacher, tiny, monkeypatch):
    def short(*_, **__):
        raise CPU_SHORT

    result = gdfq.quantize(teacher, networks.images(1), "w4a4", tiny)
    data = (networks.images(4), torch.zeros(4, dtype=torch.long))
    monkeypatch.setattr("gdfq.analysis.accuracy._batches", short)
    with pytest.raises(GdfqError, match=r"evaluating must fit.*--memory 768MiB "):
        result.evaluate(data)
    with pytest.raises(GdfqError, match=r"measuring on the test images must fit.*--memory 1MiB "):
        gdfq.quantize(teacher, networks.images(1), "w4a4", tiny, test=data, memory="2MiB")


def test_other_errors_are_not_taken_for_a_shortage():
    with pytest.raises(RuntimeError, match="mat1 and mat2"), batch_that_fits_suggested(8, print):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


def test_a_run_that_is_short_of_memory_says_so(teacher, tiny, monkeypatch):
    def short(self, *_):
        raise CPU_SHORT

    monkeypatch.setattr("gdfq.tuning.distill.Distillation.losses", short)
    with pytest.raises(GdfqError, match=r"a step on 8 images.*4 images fit: .*--batch 4 "):
        gdfq.quantize(teacher, networks.images(1), "w4a4", tiny)


def test_images_of_a_pool_may_be_what_does_not_fit(teacher, monkeypatch):
    def short(*_):
        raise CPU_SHORT

    monkeypatch.setattr("gdfq.sources.spectral.focal_loss", short)
    recipe = replace(RECIPES["fast"].with_steps(4), source=ImagePool(SpectralSource(batch=9), 9, 3))
    with pytest.raises(GdfqError, match=r"a step on 9 images.*4 images fit: .*--batch 4 "):
        gdfq.quantize(teacher, networks.images(1), "w4a4", recipe)


def test_the_batch_can_be_chosen(teacher, tiny):
    recipe = small(RECIPES["fast"]).with_batch(4)
    assert (recipe.source.batch, recipe.source.source.batch) == (4, 4)
    assert tiny.with_batch(3).source.batch == 3
    assert tiny.with_batch(None) is tiny
    with pytest.raises(gdfq.UsageError, match="at least 1; got 0"):
        tiny.with_batch(0)
    result = gdfq.quantize(teacher, networks.images(1), "w4a4", tiny, batch=5)
    assert len(result.examples[0]) == 5


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
def test_a_loss_that_is_not_finite_stops_the_run(name, where, message, teacher, monkeypatch):
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


def test_the_last_good_state_is_kept(teacher, tiny, monkeypatch, tmp_path):
    """A loss that becomes NaN late: what was written before it goes on when it is mended."""
    from gdfq.tuning import distill

    expected = gdfq.quantize(teacher, networks.images(1), "w4a4", tiny)
    original, calls = distill.distillation_loss, []

    def late(*args):
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


def test_symptoms_by_hand():
    images, labels = torch.randn(16, 3, 4, 4), torch.arange(16) % 4
    logits = torch.nn.functional.one_hot(labels, 4).float()
    assert symptom_of(images, logits, labels) is None
    assert "all images alike" in symptom_of(images[:1].expand(16, -1, -1, -1), logits, labels)
    assert "all images alike" in symptom_of(torch.zeros(16, 3, 4, 4), logits, labels)
    one = torch.zeros(16, 4)
    one[:, 2] = 1
    assert "100 % of the images in class 2" in symptom_of(images, one, labels)
    assert symptom_of(images, one, torch.zeros(16, dtype=torch.long)) is None  # as asked for
    assert symptom_of(images, None, labels) is None
    assert symptom_of(images[:7], one[:7], labels[:7]) is None


def test_a_collapse_is_one_when_it_stays():
    images, labels = torch.randn(16, 3, 4, 4), torch.arange(16) % 4
    alike = images[:1].expand_as(images)
    watch = CollapseWatch()
    for step in (0, 50, 150, 200, 201, 250):  # two looks count here
        watch.check(step, alike, None, labels)
    watch.check(300, images, None, labels)
    watch.check(350, alike, None, labels)
    other = CollapseWatch()
    other.load_state_dict(watch.state_dict())
    other.check(400, alike, None, labels)
    with pytest.raises(CollapsedError, match=r"at step 450.*all images alike"):
        other.check(450, alike, None, labels)


def collapsing(monkeypatch, times):
    """Generators that find themselves collapsed in their second batch, as often as `times`."""
    left = [times]

    def look(self, step, *_):
        if step == 1 and left[0]:
            left[0] -= 1
            raise CollapsedError(f"it has collapsed ({left[0]} to come).")

    monkeypatch.setattr("gdfq.sources.collapse.CollapseWatch.check", look)


def test_a_collapsed_generator_begins_again_once(teacher, tiny, monkeypatch, tmp_path):
    usual = gdfq.quantize(teacher, networks.images(1), "w4a4", tiny)
    collapsing(monkeypatch, 1)
    with pytest.warns(GdfqWarning, match="collapsed.*restarts from another seed"):
        result = gdfq.quantize(teacher, networks.images(1), "w4a4", tiny, checkpoints=tmp_path)
    assert "it has collapsed" in result.metrics["collapsed"]
    assert not same(state(result.network), state(usual.network))
    again = gdfq.quantize(teacher, networks.images(1), "w4a4", tiny, checkpoints=tmp_path)
    assert same(state(again.network), state(result.network))


def test_a_generator_that_collapses_twice_fails_with_the_evidence(teacher, tiny, monkeypatch):
    collapsing(monkeypatch, 2)
    with (
        pytest.warns(GdfqWarning, match="restarts"),
        pytest.raises(
            CollapsedError, match=r"0 to come.*The same happened with another seed.*1 to come"
        ),
    ):
        gdfq.quantize(teacher, networks.images(1), "w4a4", tiny)


def test_a_generator_that_learns_nothing_is_found_out(teacher, monkeypatch):
    """A generator whose images are alike, over as many steps as the watch needs."""
    monkeypatch.setattr("gdfq.sources.collapse._STEPS_BETWEEN_CHECKS", 2)
    monkeypatch.setattr("gdfq.sources.collapse._FIRST_CHECK", 4)
    source = GeneratorSource(batch=8, optimizer=replace(GeneratorSource(8).optimizer, lr=0.0))
    stream = source.stream(teacher, steps=12)
    generator = stream._parts["generator"]
    with torch.no_grad():  # the same image for every z and class
        generator.linear.weight.zero_()
    with pytest.raises(CollapsedError, match=r"at step 8.*all images alike"):
        list(stream)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.ENOENT])
def test_a_folder_that_fails_can_be_mended(place, capsys, monkeypatch, number):
    """The disk is full, or the folder read-only or gone, from one row of history on."""

    class Failing(History):
        def __call__(self, step):
            if step.index == 3:
                raise OSError(number, os.strerror(number))
            super().__call__(step)

    with monkeypatch.context() as patch:
        patch.setattr("gdfq.cli.quantize.History", Failing)
        assert main(arguments(place, "--steps", "8")) == 1
    error = capsys.readouterr().err
    assert os.strerror(number) in error
    assert "correct this, then give the same command again" in error
    assert not (place / "out" / "student.safetensors").exists()


def test_a_disk_that_is_full_at_the_end_loses_nothing(place, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    call = arguments(place, "--steps", "8")
    with monkeypatch.context() as patch:
        patch.setattr("gdfq.quantized.write_atomically", full)
        assert main(call) == 1
    assert "No space left" in capsys.readouterr().err
    rows = (place / "out" / "history.jsonl").read_text()
    assert main(call) == 0
    assert (place / "out" / "history.jsonl").read_text() == rows
    assert json.loads((place / "out" / "metrics.json").read_text())["steps"] == 8
