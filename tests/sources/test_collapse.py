"""The detection of a generator that collapsed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import networks
from support.narrowing import instance, present
from support.small_runs import same, state

import gdfq
from gdfq.errors import GdfqWarning
from gdfq.graph.capture import Captured
from gdfq.recipes import Recipe
from gdfq.sources.collapse import CollapsedError, CollapseWatch, symptom_of
from gdfq.sources.generator import Generator, GeneratorSource


def test_symptoms_match_hand_made_batches() -> None:
    images, labels = torch.randn(16, 3, 4, 4), torch.arange(16) % 4
    logits = torch.nn.functional.one_hot(labels, 4).float()
    assert symptom_of(images, logits, labels) is None
    assert "all images alike" in present(
        symptom_of(images[:1].expand(16, -1, -1, -1), logits, labels)
    )
    assert "all images alike" in present(symptom_of(torch.zeros(16, 3, 4, 4), logits, labels))
    one = torch.zeros(16, 4)
    one[:, 2] = 1
    assert "100 % of the images in class 2" in present(symptom_of(images, one, labels))
    assert symptom_of(images, one, torch.zeros(16, dtype=torch.long)) is None  # as asked for
    assert symptom_of(images, None, labels) is None
    assert symptom_of(images[:7], one[:7], labels[:7]) is None


def test_collapse_is_reported_when_it_persists() -> None:
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


def collapsing(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """Let the generator collapse in its second batch, `times` times."""
    left = [times]

    def look(self: Any, step: Any, *_: object) -> None:
        if step == 1 and left[0]:
            left[0] -= 1
            raise CollapsedError(f"it has collapsed ({left[0]} to come).")

    monkeypatch.setattr("gdfq.sources.collapse.CollapseWatch.check", look)


def test_collapsed_generator_restarts_once(
    teacher: Captured, tiny: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    usual = gdfq.quantize(teacher, networks.images(1), "w4a4", tiny)
    collapsing(monkeypatch, 1)
    with pytest.warns(GdfqWarning, match="collapsed.*restarts from another seed"):
        result = gdfq.quantize(teacher, networks.images(1), "w4a4", tiny, checkpoints=tmp_path)
    assert "it has collapsed" in result.metrics["collapsed"]
    assert not same(state(result.network), state(usual.network))
    again = gdfq.quantize(teacher, networks.images(1), "w4a4", tiny, checkpoints=tmp_path)
    assert same(state(again.network), state(result.network))


def test_generator_that_collapses_twice_fails_with_evidence(
    teacher: Captured, tiny: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    collapsing(monkeypatch, 2)
    with (
        pytest.warns(GdfqWarning, match="restarts"),
        pytest.raises(
            CollapsedError, match=r"0 to come.*The same happened with another seed.*1 to come"
        ),
    ):
        gdfq.quantize(teacher, networks.images(1), "w4a4", tiny)


def test_generator_that_learns_nothing_is_detected(
    teacher: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All images are alike over as many steps as the check needs."""
    monkeypatch.setattr("gdfq.sources.collapse._STEPS_BETWEEN_CHECKS", 2)
    monkeypatch.setattr("gdfq.sources.collapse._FIRST_CHECK", 4)
    source = GeneratorSource(batch=8, optimizer=replace(GeneratorSource(8).optimizer, lr=0.0))
    stream = source.stream(teacher, steps=12)
    generator = instance(stream._parts["generator"], Generator)
    with torch.no_grad():  # the same image for every z and class
        generator.linear.weight.zero_()
    with pytest.raises(CollapsedError, match=r"at step 8.*all images alike"):
        list(stream)
