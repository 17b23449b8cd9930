"""Denoisers of diffusion models, quantized on their own trajectories."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.denoisers import CLASSES, SHAPE, tiny_denoiser
from support.plain_scheduler import PlainConfig

import gdfq
from gdfq import UsageError
from gdfq.functional.grid import Bits
from gdfq.plan.network import resolve_network
from gdfq.plan.resolve import resolve
from gdfq.quantized import QuantizedNetwork
from gdfq.recipes import find_recipe
from gdfq.student.placement import activation_bits
from gdfq.student.scheme import LayerBits, Scheme

OF_MODEL: dict[str, Any] = {
    "scheduler": PlainConfig(noise=0.1),
    "sampling_steps": 6,
    "input_shape": SHAPE,
}
LABELS = torch.arange(CLASSES)


@pytest.fixture(scope="module")
def quantized() -> QuantizedNetwork:
    recipe = find_recipe("quick").with_images(24).with_batch(8).with_steps(8)
    return gdfq.quantize(
        tiny_denoiser(CLASSES), None, "w8a8", recipe, conditions=LABELS, **OF_MODEL
    )


def test_denoiser_is_quantized_without_data(quantized: QuantizedNetwork) -> None:
    assert [spec.name for spec in quantized.card.inputs] == ["x", "t", "label"]
    x, t = torch.randn(8, *SHAPE), torch.full((8,), 30)
    label = torch.arange(8) % CLASSES
    with torch.no_grad():
        expected = tiny_denoiser(CLASSES)(x, t, label)
    assert (quantized(x, t, label) - expected).norm() < 0.1 * expected.norm()


def test_denoiser_is_saved_and_loaded(quantized: QuantizedNetwork, tmp_path: Path) -> None:
    quantized.save(tmp_path)
    loaded = gdfq.load(tmp_path)
    inputs = torch.randn(3, *SHAPE), torch.tensor([10, 20, 90]), torch.tensor([0, 3, 1])
    assert torch.equal(quantized(*inputs), loaded(*inputs))


def test_time_and_noisy_image_stay_float_by_rule(quantized: QuantizedNetwork) -> None:
    weights = [layer.weight for layer in quantized.network.layers]
    assert {weight.name for weight in weights if weight is not None} == {"enter", "middle", "leave"}
    assert weights.count(None) == 2  # of the time step
    network = resolve_network(tiny_denoiser(CLASSES), conditions=LABELS, **OF_MODEL)
    plain = Scheme(Bits.parse("w4a8"), "full")
    of_denoiser = dataclasses.replace(plain, denoiser=True)
    rounded, kept = (
        {node.name for node in activation_bits(network.teacher, scheme)}
        for scheme in (plain, of_denoiser)
    )
    assert "x" in rounded
    assert kept < rounded
    scalars = {"x", "t", "label"} | {name for name in rounded if "linear" in name}
    assert not kept & scalars
    named = dataclasses.replace(of_denoiser, layer_bits=(LayerBits("time.2", 8),))
    layers = {node.name: bits for node, bits in activation_bits(network.teacher, named).items()}
    assert set(layers) > kept  # what enters the named layer is rounded


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"test": torch.zeros(4, *SHAPE)}, "measured on images that it generates"),
        ({"iterations": 5}, "Remove iterations"),
        ({"budget": "5m"}, "Remove budget"),
        ({"scheduler": None}, "have a scheduler; none was given"),
        ({"input_shape": None}, "as --input 3x32x32"),
        ({"input_shape": (2, 8, 8)}, "was called with an image, a time step and a condition"),
        ({"conditions": None}, "embeddings of prompts, give --conditions"),
        ({"conditions": "nowhere.npz"}, "must be an .npz file with an array"),
        ({"conditions": torch.zeros(0)}, "at least one condition"),
        ({"sampling_steps": 0}, "at least 1; got 0"),
    ],
)
def test_unusable_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve(tiny_denoiser(CLASSES), **{**OF_MODEL, "conditions": LABELS, **options})


def test_captured_denoiser_must_take_what_the_sampler_gives() -> None:
    captured = resolve_network(tiny_denoiser(), **OF_MODEL).teacher
    assert resolve_network(captured, **OF_MODEL).teacher.inputs == captured.inputs
    with pytest.raises(UsageError, match="must take an image, a time step"):
        resolve_network(captured, conditions=LABELS, **OF_MODEL)


def test_conditions_are_read_from_a_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "labels.npz", conditions=np.array([1, 3]))
    found = resolve_network(tiny_denoiser(CLASSES), conditions=tmp_path / "labels.npz", **OF_MODEL)
    assert found.sampler is not None
    assert found.sampler.conditions is not None
    assert found.sampler.conditions.tolist() == [1, 3]


def test_images_are_points_of_trajectories_and_tell_runs_apart() -> None:
    plan, other = (
        resolve(
            tiny_denoiser(), None, "w8a8", **{**OF_MODEL, "images": 48, "sampling_steps": steps}
        )
        for steps in (6, 7)
    )
    assert plan.recipe.source.images_held == 48
    assert plan.scheme.denoiser
    values = plan.as_values()
    json.dumps(values)
    assert values["sampler"]["steps"] == 6
    assert values["recipe"] != other.as_values()["recipe"]
