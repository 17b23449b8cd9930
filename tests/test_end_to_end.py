"""Real images: the digits that scikit-learn ships, and the CIFAR-10 network of ../shared."""

from dataclasses import replace

import pytest
import torch
from support.places import ROOT

import gdfq
from gdfq import demo
from gdfq.analysis.accuracy import logits_of
from gdfq.analysis.accuracy_drop import measure
from gdfq.analysis.predictions import paired_drop
from gdfq.data.datasets import ArrayData
from gdfq.graph.capture import capture
from gdfq.models.registry import load_model
from gdfq.recipes import find_recipe
from gdfq.tuning.base import NO_TUNING


@pytest.fixture(scope="module")
def digits():
    training, held_out = demo.load_digits()
    return demo.train(training), training, (held_out.images, held_out.labels)


def quantize(digits, bits, recipe, **more):
    network, _, test = digits
    return gdfq.quantize(
        network,
        torch.zeros(1, *demo.INPUT_SHAPE),
        bits,
        recipe,
        mean=demo.PREPROCESSING.mean,
        std=demo.PREPROCESSING.std,
        test=test,
        **more,
    ).metrics


def test_gdfq_beats_direct_rounding_on_real_digits(digits):
    """What `make demo` shows: most of what 4-bit rounding loses comes back without data."""
    rounded = quantize(digits, "w4a4", demo.ROUNDING)
    tuned = quantize(digits, "w4a4", demo.RECIPE)
    teacher = tuned["teacher"]["top1"]
    assert teacher > 93
    assert tuned["student"]["top1"] > rounded["student"]["top1"] + 1
    assert tuned["student"]["top1"] > teacher - 8


def test_fast_beats_direct_rounding_by_far_at_three_bits(digits):
    """Six points at least, in ninety updates on images that no one took."""
    rounded = quantize(digits, "w3a3", demo.ROUNDING, placement="relu")
    fast = quantize(digits, "w3a3", "fast", steps=100, placement="relu")
    assert fast["student"]["top1"] > rounded["student"]["top1"] + 6


def test_the_loss_is_foreseen_without_data(digits):
    """Students from harmless to poor come in their order, each drop lies about in its interval.

    As far as a few hundred images tell the drop, that is: within two of its standard errors. Two
    students of each kind, because one's luck moves its drop by a point or two. Where the interval
    begins above the drop, it does so by what docs/trust.md tells of this network at most.
    """
    careful = 3.2
    network, _, (images, labels) = digits
    teacher = capture(network, torch.zeros(1, *demo.INPUT_SHAPE))
    recipe = replace(find_recipe("quick"), tuning=NO_TUNING, steps=2, calibration=2, warmup=2)

    def right(module):
        data = ArrayData(images, labels)
        logits = logits_of(module, data, demo.PREPROCESSING, device=torch.device("cpu"))
        return logits.argmax(1) == labels

    was_right = right(teacher.network)

    def seen(bits, seed):
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
        lost, won = int((was_right & ~is_right).sum()), int((~was_right & is_right).sum())
        foreseen = measure(teacher, student.network, seed=seed)
        return (
            *paired_drop(lost, won, len(labels)),
            *foreseen.interval,
            foreseen.expected_drop,
        )

    expected = []
    for bits in ("w8a8", "w4a4", "w3a3"):
        both = torch.tensor([seen(bits, seed) for seed in (0, 1)]).mean(0)
        drop, error, low, high, foreseen = both.tolist()
        assert low - careful - 2 * error <= max(drop, 0) <= high + 2 * error
        expected.append(foreseen)
    assert expected == sorted(expected)
    assert expected[0] < 1 < expected[-1]


def test_eight_bits_cost_next_to_nothing(digits):
    metrics = quantize(digits, "w8a8", find_recipe("zeroq"))
    assert abs(metrics["student"]["top1"] - metrics["teacher"]["top1"]) < 1


def test_real_images_tune_at_least_as_well(digits):
    _, training, _ = digits
    recipe = find_recipe("paper-real").with_steps(200)
    few = quantize(digits, "w4a4", recipe, data=(training.images, training.labels))
    assert few["student"]["top1"] > few["teacher"]["top1"] - 8


def test_cifar10_resnet20_at_eight_bits(shared):
    loaded = load_model(
        f"{ROOT}/support/real_networks.py:cifar10_resnet20",
        shared / "models/cifar10_resnet20.safetensors",
    )
    result = gdfq.quantize(
        loaded.module,
        torch.zeros(1, 3, 32, 32),
        "w8a8",
        "paper-real",
        steps=8,
        data=shared / "data/cifar10_train5k.npz",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        test=shared / "data/cifar10_test.npz",
    )
    assert result.metrics["teacher"]["top1"] == pytest.approx(91.73, abs=0.02)
    assert result.metrics["student"]["top1"] > 91.4
