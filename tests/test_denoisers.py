"""Denoisers of diffusion models, quantized on their own trajectories."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import networks
from support.denoisers import CLASSES, SHAPE, TinyDenoiser, saved_unet, tiny_denoiser
from support.narrowing import present
from support.plain_scheduler import PlainConfig
from torch import Tensor

import gdfq
from gdfq import UsageError
from gdfq.execution.progress import Step
from gdfq.functional.grid import Bits
from gdfq.graph import queries
from gdfq.plan.network import resolve_network
from gdfq.plan.resolve import resolve
from gdfq.quantized import QuantizedNetwork
from gdfq.quantizers.family import LSQ
from gdfq.recipes import find_recipe
from gdfq.report.read import read_run
from gdfq.report.verdict import verdict
from gdfq.runs.diagnostics import gather, write_evidence
from gdfq.sources.base import joined_inputs
from gdfq.student.placement import activation_bits
from gdfq.student.scheme import LayerBits, Scheme
from gdfq.tuning.base import NO_TUNING
from gdfq.tuning.reconstruct import Reconstruction

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
    draw = torch.Generator().manual_seed(0)
    x, t = torch.randn(8, *SHAPE, generator=draw), torch.full((8,), 30)
    label = torch.arange(8) % CLASSES
    with torch.no_grad():
        expected = tiny_denoiser(CLASSES)(x, t, label)
    assert (quantized(x, t, label) - expected).norm() < 0.1 * expected.norm()


def test_first_layer_of_a_denoiser_is_the_first_that_is_quantized() -> None:
    network = resolve_network(tiny_denoiser(CLASSES), conditions=LABELS, **OF_MODEL)
    ends = (LayerBits("first", 8), LayerBits("last", 8))
    scheme = Scheme(Bits.parse("w2a8"), "full", ends, denoiser=True)
    layers = list(filter(queries.has_weight, network.teacher.network.graph.nodes))
    found = scheme.weight_bits(layers)
    bits = {queries.layer_name(layer): width for layer, width in found.items()}
    assert bits == {"enter": 8, "middle": 2, "leave": 8}


def test_denoiser_that_ends_in_a_sigmoid_is_refused() -> None:
    class Bounded(TinyDenoiser):
        def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
            return super().forward(x, t, label).sigmoid()

    with pytest.raises(UsageError, match="ends in a sigmoid"):
        resolve_network(Bounded(CLASSES).eval(), conditions=LABELS, **OF_MODEL)


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
    of_denoiser = replace(plain, denoiser=True)
    rounded, kept = (
        {node.name for node in activation_bits(network.teacher, scheme)}
        for scheme in (plain, of_denoiser)
    )
    assert "x" in rounded
    assert kept < rounded
    scalars = {"x", "t", "label"} | {name for name in rounded if "linear" in name}
    assert not kept & scalars
    named = replace(of_denoiser, layer_bits=(LayerBits("time.2", 8),))
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


def test_run_compares_generated_images(quantized: QuantizedNetwork) -> None:
    assert quantized.metrics["samples"]["images"] == 64
    assert quantized.metrics["samples"]["psnr"] > 20
    found = gdfq.compare_samples(
        quantized,
        tiny_denoiser(CLASSES),
        conditions=LABELS,
        features=lambda x: x.mean((1, 2, 3))[:, None],
        **OF_MODEL,
    )
    assert found.psnr == pytest.approx(quantized.metrics["samples"]["psnr"], abs=0.01)
    assert present(found.frechet) < 0.1


def test_comparison_needs_the_network_of_the_student(quantized: QuantizedNetwork) -> None:
    with pytest.raises(UsageError, match="the network that it was made from"):
        gdfq.compare_samples(quantized, tiny_denoiser(), **OF_MODEL)
    with pytest.raises(UsageError, match="generated by denoisers"):
        gdfq.compare_samples(quantized, networks.make("Residual"), torch.zeros(1, *networks.SHAPE))


def test_samples_are_for_denoisers() -> None:
    options: dict[str, Any] = {**OF_MODEL, "conditions": LABELS}
    assert resolve(tiny_denoiser(CLASSES), **options, samples=0).samples == 0
    with pytest.raises(UsageError, match="at least 0; got -1"):
        resolve(tiny_denoiser(CLASSES), **options, samples=-1)
    with pytest.raises(UsageError, match="samples are for denoisers"):
        resolve(networks.make("Residual"), torch.zeros(1, *networks.SHAPE), samples=3)


def test_rounding_is_learned_on_trajectories() -> None:
    genie = find_recipe("genie")
    assert isinstance(genie.tuning, Reconstruction)
    tuning = replace(genie.tuning, images=48)
    learned = replace(genie, placement="full", tuning=tuning).with_steps(101)
    nearest = replace(learned, tuning=NO_TUNING, quantizers=LSQ).with_steps(1)
    rounded, tuned = (
        gdfq.quantize(tiny_denoiser(), None, "w3a8", recipe, images=48, batch=48, **OF_MODEL)
        for recipe in (nearest, learned)
    )
    assert tuned.metrics["samples"]["psnr"] > rounded.metrics["samples"]["psnr"] + 3


@pytest.mark.parametrize(("name", "seen"), [("quick", 8), ("patches", 8), ("genie", 3)])
def test_trained_denoiser_has_the_mean_of_the_original(name: str, seen: int) -> None:
    """On the points that it saw: what training leaves of a mean error adds up in a trajectory."""
    model, recipe = tiny_denoiser(), find_recipe(name)
    if isinstance(recipe.tuning, Reconstruction):
        recipe = replace(recipe, tuning=replace(recipe.tuning, images=24), calibration=1, warmup=1)
    recipe = replace(recipe, placement="full").with_images(24).with_batch(8).with_steps(8)
    plan = resolve(model, None, "w3a8", recipe, **OF_MODEL)
    assert plan.recipe.tuning.trains
    batches = plan.source.stream(plan.teacher, steps=plan.recipe.steps)
    points = joined_inputs([next(batches) for _ in range(seen)])
    quantized = gdfq.quantize(model, None, "w3a8", recipe, samples=0, **OF_MODEL)
    with torch.no_grad():
        error = (quantized(*points) - model(*points)).transpose(0, 1).flatten(1)
    assert bool((error.mean(1).abs() < 0.02 * error.std(1)).all())


def test_stopped_tuning_of_a_denoiser_resumes_to_the_bit(tmp_path: Path) -> None:
    """The points whose mean error is corrected at the end outlive the stop."""
    recipe = find_recipe("quick").with_images(24).with_batch(8).with_steps(8)
    run: dict[str, Any] = {"bits": "w3a8", "recipe": recipe, "samples": 0, **OF_MODEL}

    def stop(step: Step) -> None:
        if (step.stage, step.index) == ("tune", 6):
            raise KeyboardInterrupt

    whole = gdfq.quantize(tiny_denoiser(), **run)
    with pytest.raises(KeyboardInterrupt):
        gdfq.quantize(tiny_denoiser(), **run, checkpoints=tmp_path, listener=stop)
    resumed = gdfq.quantize(tiny_denoiser(), **run, checkpoints=tmp_path)
    x, t = torch.randn(4, *SHAPE), torch.full((4,), 30)
    assert resumed(x, t).equal(whole(x, t))


def test_report_shows_images_side_by_side(quantized: QuantizedNetwork, tmp_path: Path) -> None:
    network = resolve_network(tiny_denoiser(CLASSES), conditions=LABELS, **OF_MODEL)
    evidence = gather(network.teacher, quantized)
    assert len(evidence.sections["samples"]["errors"]) == 6
    write_evidence(evidence, tmp_path)
    (tmp_path / "config.json").write_text('{"gdfq": "0.2.0", "sampler": {}}')
    page = gdfq.write_report(tmp_path).read_text()
    assert page.count("image of the quantized network") == 16
    assert "side by side" in page
    assert re.findall('<section id="(.*?)"', page) == ["samples", "layers", "training", "repeat"]
    assert not evidence.missing


def test_run_without_samples_tries_no_estimate_of_accuracy() -> None:
    recipe = find_recipe("quick").with_images(8).with_batch(8).with_steps(4)
    result = gdfq.quantize(tiny_denoiser(), None, "w8a8", recipe, samples=0, **OF_MODEL)
    evidence = gather(resolve_network(tiny_denoiser(), **OF_MODEL).teacher, result)
    assert list(evidence.sections) == ["layers"]
    assert evidence.missing == {"samples": "none were asked for"}
    assert "samples" not in result.metrics


@pytest.mark.parametrize(
    ("found", "level", "sentence", "said"),
    [
        ({"psnr": 30.0, "psnr_low": 26.2}, "good", "are close to the original's.", "below 26.2 dB"),
        ({"psnr": 29.9, "frechet": 0.5}, "fair", "differ somewhat", "of the original: 0.500"),
        ({"psnr": 19.9}, "poor", "differ much", "PSNR 19.9 dB over 4 pairs"),
        ({}, "unknown", "were not compared", ""),
    ],
)
def test_verdict_on_a_denoiser_is_of_its_images(
    tmp_path: Path, found: dict[str, float], level: str, sentence: str, said: str
) -> None:
    (tmp_path / "config.json").write_text('{"gdfq": "0.2.0", "sampler": {"steps": 6}}')
    samples = {"samples": {"images": 4, **found}} if found else {}
    (tmp_path / "metrics.json").write_text(json.dumps(samples))
    verdict_of_run = verdict(read_run(tmp_path))
    assert verdict_of_run.level == level
    assert sentence in verdict_of_run.sentence
    assert said in " ".join(verdict_of_run.evidence)
    more = ("evaluate" in line or "More bits" in line for line in verdict_of_run.advice)
    assert any(more) == (level != "good")


@pytest.mark.needs("diffusers")
@pytest.mark.filterwarnings("ignore")
def test_pipeline_generates_with_the_student(tmp_path: Path) -> None:
    import diffusers

    place = saved_unet(tmp_path / "pipeline")
    result = gdfq.quantize(
        f"diffusers:{place}", None, "w8a8", "quick", images=32, batch=16, sampling_steps=4,
        samples=4,
    )  # fmt: skip
    original: Any = diffusers.DDPMPipeline.from_pretrained(place)
    made = [
        pipeline(num_inference_steps=4, generator=draw, output_type="np").images
        for pipeline in (original, result.pipeline(str(place)))
        for draw in [torch.Generator().manual_seed(1)]
    ]
    assert 0 < np.abs(made[0] - made[1]).mean() < 0.05
    assert result.pipeline(original) is original
    with pytest.raises(UsageError, match="must have a denoiser"):
        result.pipeline(object())
