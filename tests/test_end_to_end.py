"""Real images: the digits that scikit-learn ships, and the CIFAR-10 network of ../shared."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.narrowing import instance, present
from support.places import ROOT
from support.trained_digits import TrainedDigits
from torch import Tensor, nn

import gdfq
from gdfq import demo
from gdfq.analysis.accuracy import logits_of
from gdfq.analysis.accuracy_drop import measure_expected_drop
from gdfq.analysis.predictions import paired_drop
from gdfq.data.datasets import ArrayData
from gdfq.graph.capture import Captured, capture
from gdfq.models.registry import load_model
from gdfq.recipes import Recipe, find_recipe
from gdfq.sources.pool import ImagePool
from gdfq.tuning.base import NO_TUNING


@pytest.fixture(scope="module")
def teacher(digits: TrainedDigits) -> Captured:
    return capture(digits.network, torch.zeros(1, *demo.INPUT_SHAPE))


Accuracies = Callable[..., tuple[float, float]]
"""Top-1 of teacher and student, given bits, recipe and further options of `quantize`."""


@pytest.fixture(scope="module")
def accuracies(teacher: Captured, digits: TrainedDigits) -> Accuracies:
    """Top-1 of the teacher and of its student on the half of the digits that is held out."""

    def measured(bits: str, recipe: Recipe, **more: Any) -> tuple[float, float]:
        metrics = gdfq.quantize(
            teacher,
            torch.zeros(1, *demo.INPUT_SHAPE),
            bits,
            recipe,
            mean=demo.PREPROCESSING.mean,
            std=demo.PREPROCESSING.std,
            test=(digits.held_out.images, digits.held_out.labels),
            **more,
        ).metrics
        return metrics["teacher"]["top1"], metrics["student"]["top1"]

    return measured


@pytest.mark.check
@pytest.mark.parametrize(
    "steps", [300, pytest.param(demo.RECIPE.steps, marks=pytest.mark.check, id="demo")]
)
def test_paper_beats_direct_rounding_on_real_digits(accuracies: Accuracies, steps: int) -> None:
    """Tuning without data recovers most of the loss of 4-bit rounding; `make demo` takes 1,000 steps."""
    recipe = demo.RECIPE.with_steps(steps)
    _, rounded = accuracies("w4a4", demo.ROUNDING.with_steps(recipe.calibration))
    teacher, tuned = accuracies("w4a4", recipe)
    assert teacher > 93
    assert tuned > rounded + 1
    assert tuned > teacher - 8


@pytest.mark.check
def test_fast_beats_direct_rounding_at_three_bits(accuracies: Accuracies) -> None:
    """By at least six points, with fifty updates on a quarter of the recipe's images."""
    fast = find_recipe("fast").with_steps(60)
    fast = replace(fast, source=replace(instance(fast.source, ImagePool), images=1024))
    _, rounded = accuracies("w3a3", demo.ROUNDING.with_steps(75), placement="relu")
    _, tuned = accuracies("w3a3", fast, placement="relu")
    assert tuned > rounded + 6


@pytest.mark.check
def test_expected_drop_contains_the_measured_drop(digits: TrainedDigits, teacher: Captured) -> None:
    """Students from harmless to poor come in their order, each drop lies in its interval.

    As far as a few hundred images tell the drop, that is: within two of its standard errors. Two
    students of each kind, because one's luck moves its drop by a point or two.
    """
    images, labels = digits.held_out.images, digits.held_out.labels
    recipe = replace(find_recipe("quick"), tuning=NO_TUNING, steps=2, calibration=2, warmup=2)

    def right(module: nn.Module) -> Tensor:
        data = ArrayData(images, labels)
        logits = logits_of(module, data, demo.PREPROCESSING, device=torch.device("cpu"))
        return logits.argmax(1) == labels

    was_right = right(teacher.network)

    def seen(bits: str, seed: int) -> tuple[float | None, ...]:
        student = gdfq.quantize(
            teacher,
            torch.zeros(1, *demo.INPUT_SHAPE),
            bits,
            recipe,
            mean=demo.PREPROCESSING.mean,
            std=demo.PREPROCESSING.std,
            seed=seed,
        )
        is_right = right(student.network)
        lost, gained = int((was_right & ~is_right).sum()), int((~was_right & is_right).sum())
        estimate = measure_expected_drop(teacher, student.network, seed=seed)
        return (
            *paired_drop(lost, gained, len(labels)),
            *present(estimate.interval),
            estimate.expected_drop,
        )

    expected = []
    for bits in ("w8a8", "w4a4", "w3a3"):
        both = torch.tensor([seen(bits, seed) for seed in (0, 1)]).mean(0)
        drop, error, low, high, estimate = both.tolist()
        assert low - 2 * error <= max(drop, 0) <= high + 2 * error
        expected.append(estimate)
    assert expected == sorted(expected)
    assert expected[0] < 1 < expected[-1]


def test_eight_bits_lose_less_than_one_point(accuracies: Accuracies) -> None:
    teacher, student = accuracies("w8a8", find_recipe("zeroq"))
    assert abs(student - teacher) < 1


@pytest.mark.check
def test_paper_real_loses_less_than_eight_points(
    accuracies: Accuracies, digits: TrainedDigits
) -> None:
    recipe = find_recipe("paper-real").with_steps(200)
    data = (digits.training.images, digits.training.labels)
    teacher, student = accuracies("w4a4", recipe, data=data)
    assert student > teacher - 8


@pytest.mark.parametrize(
    ("images", "top1"), [(2000, 91.70), pytest.param(10000, 91.73, marks=pytest.mark.check)]
)
def test_cifar10_resnet20_keeps_its_accuracy_at_eight_bits(
    shared: Path, images: Tensor, top1: float
) -> None:
    """The weights' published accuracy, of all test images and of the first of them."""
    loaded = load_model(
        f"{ROOT}/support/real_networks.py:cifar10_resnet20",
        shared / "models/cifar10_resnet20.safetensors",
    )
    with np.load(shared / "data/cifar10_test.npz") as file:
        test = (file["images"][:images], file["labels"][:images])
    result = gdfq.quantize(
        loaded.module,
        torch.zeros(1, 3, 32, 32),
        "w8a8",
        "paper-real",
        steps=8,
        data=shared / "data/cifar10_train5k.npz",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        test=test,
    )
    assert result.metrics["teacher"]["top1"] == pytest.approx(top1, abs=0.02)
    assert result.metrics["student"]["top1"] > top1 - 0.33
