"""Whole runs of `quantize` and `generate`: determinism, isolation, options."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import networks
from support.narrowing import instance, present
from support.small_runs import same, small, state

import gdfq
from gdfq import RECIPES, UsageError
from gdfq.execution.progress import Step
from gdfq.graph.capture import Captured
from gdfq.optim import SgdConfig
from gdfq.quantized import QuantizedNetwork
from gdfq.recipes import PAPER, Recipe
from gdfq.tuning.distill import Distillation

OF_IMAGES = [name for name, recipe in RECIPES.items() if recipe.placement != "tokens"]
"""Recipes of networks that are no language models."""


@pytest.mark.parametrize("name", OF_IMAGES)
def test_recipe_gives_a_working_student(name: str, teacher: Captured) -> None:
    data = (networks.images(24), torch.arange(24) % 5) if "real" in name else None
    result = gdfq.quantize(
        teacher, networks.images(1), "w4a4", small(RECIPES[name]), data=data, steps=8
    )
    logits = result(networks.images(3))
    assert logits.shape == (3, networks.CLASSES)
    assert logits.isfinite().all()
    assert result.metrics["steps"] == 8
    assert {"total", "capture", "calibrate"} <= result.metrics["seconds"].keys()


def test_generate_refuses_too_few_steps(teacher: Captured) -> None:
    with pytest.raises(UsageError, match="steps=3"):
        gdfq.generate(teacher, networks.images(1), 4, "fast", steps=3)


def test_fast_gives_the_same_bits_for_one_seed(teacher: Captured) -> None:
    recipe = small(RECIPES["fast"])
    runs = [
        gdfq.quantize(teacher, networks.images(1), "w3a3", recipe, steps=8, seed=seed)
        for seed in (0, 0, 1)
    ]
    first, again, other = (state(run.network) for run in runs)
    assert same(first, again)
    assert not same(first, other)


def test_quantize_leaves_the_module_and_the_random_state_unchanged(tiny: Recipe) -> None:
    model = networks.make("Residual").train()
    before = copy.deepcopy(model.state_dict())
    random = torch.random.get_rng_state()
    gdfq.quantize(model, networks.images(1), "w4a4", tiny)
    assert same(model.state_dict(), before)
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), random)
    assert torch.is_grad_enabled()


def test_quantize_gives_the_same_bits_for_one_seed(teacher: Captured, tiny: Recipe) -> None:
    a, b, other = (
        state(gdfq.quantize(teacher, networks.images(1), "w4a4", tiny, seed=seed))
        for seed in (3, 3, 4)
    )
    assert same(a, b)
    assert not same(a, other)


@pytest.mark.parametrize("bits", ["w2a2", "w3a3", "w4a8", "w8a4", "w5a6", "w7a7"])
@pytest.mark.parametrize("placement", ["relu", "full"])
def test_codes_fit_in_the_bits_at_every_placement(
    teacher: Captured, tiny: Recipe, bits: str, placement: str
) -> None:
    ends = [f"first={bits[1]}", f"last={bits[1]}"]
    result = gdfq.quantize(
        teacher, networks.images(1), bits, tiny, placement=placement, layer_bits=ends
    )
    codes = [t for n, t in result.network.named_buffers() if n.endswith("codes")]
    assert max(len(t.unique()) for t in codes) <= 2 ** int(bits[1])
    assert result.card.placement == placement
    assert str(result.card.bits) == bits


def test_tuning_reduces_the_cross_entropy(teacher: Captured, tiny: Recipe) -> None:
    """The cross-entropy on the stream falls."""
    heard: list[Step] = []
    tuning = instance(PAPER.tuning, Distillation)
    faster = replace(tuning, optimizer=replace(instance(tuning.optimizer, SgdConfig), lr=1e-2))
    recipe = replace(tiny.with_steps(80), tuning=faster)
    gdfq.quantize(teacher, networks.images(1), "w4a4", recipe, listener=heard.append)
    tuned = [step for step in heard if step.stage == "tune"]
    assert [step.index for step in tuned][:2] == [3, 4]
    assert set(tuned[0].losses) == {"generator", "bns", "boundary", "student", "ce", "kd"}
    assert float(tuned[-1].losses["ce"]) < float(tuned[0].losses["ce"])


def test_data_replaces_the_source(teacher: Captured, tiny: Recipe) -> None:
    data = (networks.images(20), torch.arange(20) % 5)
    few = gdfq.quantize(teacher, networks.images(1), "w4a4", tiny, data=data)
    none = gdfq.quantize(teacher, networks.images(1), "w4a4", tiny)
    assert not same(state(few), state(none))


@pytest.mark.parametrize("name", ["data", "proxy"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_images_of_half_precision_are_those_in_single(
    teacher: Captured, name: str, dtype: torch.dtype
) -> None:
    images, recipe = networks.images(24).to(dtype), small(RECIPES["quick"]).with_steps(5)

    def quantized(given: torch.Tensor) -> gdfq.QuantizedNetwork:
        options: dict[str, Any] = {name: given}
        return gdfq.quantize(teacher, None, "w4a4", recipe, **options)

    assert same(state(quantized(images).network), state(quantized(images.float()).network))


def test_evaluate_counts_correct_predictions(teacher: Captured, tiny: Recipe) -> None:
    result = gdfq.quantize(teacher, networks.images(1), "w8a8", tiny)
    images = networks.images(40)
    predictions = result(images).argmax(1)
    wrong = predictions.clone()
    wrong[:10] = (wrong[:10] + 1) % 5
    assert result.evaluate((images, predictions)) == 100
    assert result.evaluate((images, wrong)) == 75


def test_test_images_do_not_change_the_student(teacher: Captured, tiny: Recipe) -> None:
    test = (networks.images(20), torch.arange(20) % 5)
    with_test = gdfq.quantize(teacher, networks.images(1), "w4a4", tiny, test=test)
    without = gdfq.quantize(teacher, networks.images(1), "w4a4", tiny)
    assert same(state(with_test), state(without))
    assert 0 <= with_test.metrics["teacher"]["top1"] <= 100
    assert "student" not in without.metrics


def test_evaluate_normalises_pixels(tmp_path: Path, teacher: Captured, tiny: Recipe) -> None:
    """uint8 images with mean and std give what normalised floats give."""
    pixels = torch.randint(0, 256, (30, *networks.SHAPE), dtype=torch.uint8)
    labels = torch.arange(30) % 5
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    result = gdfq.quantize(teacher, networks.images(1), "w8a8", tiny, mean=mean, std=std)
    column = (1, 3, 1, 1)
    floats = (pixels / 255 - torch.tensor(mean).view(column)) / torch.tensor(std).view(column)
    np.savez(tmp_path / "d.npz", images=pixels.numpy(), labels=labels.numpy())
    assert result.evaluate(tmp_path / "d.npz") == result.evaluate((floats, labels))


def test_generate_returns_the_last_images(teacher: Captured, tiny: Recipe) -> None:
    images, labels = gdfq.generate(teacher, networks.images(1), 12, tiny, seed=1)
    assert images.shape == (12, *networks.SHAPE)
    assert present(labels).shape == (12,)
    assert int(present(labels).max()) < networks.CLASSES
    again, _ = gdfq.generate(teacher, networks.images(1), 12, tiny, seed=1)
    assert torch.equal(images, again)
    many, _ = gdfq.generate(teacher, networks.images(1), 100, tiny)  # more than its steps give
    assert len(many) == 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": "w1a4"}, "2 to 8 bits"),
        ({"recipe": "papr"}, "no recipe 'papr'.*paper-imagenet"),
        ({"steps": 3}, "at least 4"),
        ({"seed": -1}, "a seed must be a whole number, at least 0; got -1"),
        ({"seed": "a"}, "a seed must be a whole number, at least 0; got 'a'"),
        ({"steps": -1}, "steps must be a whole number of at least 0; got -1"),
        ({"steps": False}, "steps must be a whole number of at least 0; got False"),
        ({"steps": 2}, "at least 4, or 0 for no tuning; got 2"),
        ({"steps": 4.5}, "whole number"),
        ({"images": True}, "whole number of at least 1; got True"),
        ({"precision": "float16"}, "float32 or bfloat16; got 'float16'"),
        ({"listener": 3}, "a function that takes a step; got 3"),
        ({"group": 2, "checkpoints": "run"}, "distributed.joined gives; got 2"),
        ({"weights": "w.pt"}, "by its name.* and w.pt. Load them with load_state_dict"),
        ({"input_shape": (3, 9, 9)}, "takes the shape of example_input. Remove input_shape"),
        ({"bits": 4}, "w4a4"),
        ({"layer_bits": "last=8"}, r'got the text .last=8.\. Give a list: \["last=8"\]'),
        ({"data": [1, 2, 3]}, "pair of images and labels"),
        ({"data": torch.zeros(4, 3, 8, 8, dtype=torch.int32)}, "uint8 pixels or floats"),
        ({"placement": "half"}, "one of relu, full"),
        ({"device": "tpu"}, "one of auto, cpu"),
        ({"device": torch.device("meta")}, "one of auto, cpu.*got 'meta'"),
        ({"mean": (0.5,)}, "each of the 3 input channels; got 1"),
        ({"std": (1, 0, 1)}, "must be positive"),
        ({"mean": (0, float("nan"), 0)}, "finite"),
        ({"recipe": "real"}, "--data"),
        ({"data": "nowhere.npz"}, "no data at nowhere.npz"),
        ({"test": (torch.zeros(0, 3, 8, 8), torch.zeros(0))}, "at least one image"),
        ({"test": (torch.zeros(2, 3, 8, 8), torch.tensor([0, 5]))}, r"0\.\.4.*0\.\.5"),
        ({"test": (torch.zeros(2, 3, 8, 8), torch.tensor([-1, 0]))}, r"-1\.\.0"),
        ({"test": (torch.zeros(2, 3, 8, 8), torch.tensor([0]))}, "one label for each"),
        ({"test": (torch.zeros(2, 1, 8, 8), torch.tensor([0, 1]))}, "input shape"),
        ({"test": torch.zeros(2, 3, 8, 8)}, "need labels"),
    ],
)
def test_quantize_refuses_invalid_options(
    teacher: Captured, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=f"(?s){message}"):
        gdfq.quantize(teacher, networks.images(1), **options)


def test_quantize_refuses_what_is_no_network_of_full_precision(
    quantized: QuantizedNetwork, tmp_path: Path
) -> None:
    for model in (quantized, quantized.network):
        with pytest.raises(UsageError, match="this network is already quantized"):
            gdfq.quantize(model, networks.images(1))
    quantized.save(tmp_path)
    with pytest.raises(UsageError, match="is a run of gdfq, already quantized"):
        gdfq.quantize(str(tmp_path))
    state: Any = quantized.state_dict()
    with pytest.raises(UsageError, match=r"a state dict, which holds weights alone\. Load it"):
        gdfq.quantize(state, networks.images(1))


def test_example_of_a_name_is_refused_with_the_option_for_its_shape(place: Path) -> None:
    with pytest.raises(UsageError, match=r"example_input is for .* Give input_shape=\(3, 8, 8\)"):
        gdfq.quantize(f"{place}/net.py:factory", networks.images(1))


def test_device_may_be_one_of_torch(teacher: Captured) -> None:
    device = torch.device("cpu")
    images, _ = gdfq.generate(teacher, None, 2, "zeroq", device=device)
    assert images.device == device


@pytest.mark.parametrize("count", ["2", 0, 1.5, True])
def test_generate_needs_a_number_of_images(teacher: Captured, count: Any) -> None:
    with pytest.raises(UsageError, match="count must be a positive whole number; got"):
        gdfq.generate(teacher, None, count)


def test_quantize_refuses_an_option_that_it_does_not_have(teacher: Captured, tiny: Recipe) -> None:
    with pytest.raises(TypeError, match=r"options must be among batch, .*; got placment\."):
        gdfq.quantize(teacher, recipe=tiny, placment="full")  # type: ignore[call-arg]
