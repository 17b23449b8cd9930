"""Bit allocation is the best choice for the budget, and the file fits in it."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import networks
from support.calls import rows_of_calls
from support.command_line import arguments
from support.narrowing import instance, present
from torch import Tensor, fx

import gdfq
from gdfq import UsageError
from gdfq.analysis.bit_allocation import divergence, free_layers, sensitivities
from gdfq.cli import main
from gdfq.deploy.metadata import metadata_of
from gdfq.deploy.onnx.writer import to_onnx
from gdfq.effort import counted
from gdfq.execution.budget import MemoryBudget
from gdfq.execution.context import Context
from gdfq.execution.progress import Step
from gdfq.functional.grid import Bits, Layout, fake_quantize
from gdfq.graph.batch_norms import fold_batch_norms
from gdfq.graph.capture import Captured
from gdfq.graph.memory import forward_bytes
from gdfq.plan.method import resolve_method
from gdfq.quantized import QuantizedNetwork
from gdfq.quantizers.lsq import best_weight_grid
from gdfq.recipes import QUICK
from gdfq.sources.pool import ImagePool
from gdfq.sources.spectral import SpectralSource
from gdfq.student.scheme import LayerBits, Scheme

QUICK_POOL = instance(QUICK.source, ImagePool)
FEW_IMAGES = replace(
    QUICK_POOL,
    source=replace(instance(QUICK_POOL.source, SpectralSource), batch=8, iterations=3),
    images=16,
    batch=8,
)
SMALL = replace(QUICK, source=FEW_IMAGES)


def test_divergence_matches_hand_computed_values(teacher: Captured) -> None:
    student, expected_outputs = torch.tensor([[0.0, math.log(3)]]), torch.zeros(1, 2)
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert float(divergence(teacher)(student, expected_outputs)) == pytest.approx(expected)
    zeros = torch.zeros(1, 2)
    others = (zeros + 2, zeros + 4), (zeros + 1, zeros + 1)  # (1² + 1²)/2 and (3² + 3²)/2
    assert float(divergence(replace(teacher, classes=None))(*others)) == pytest.approx(5)


def test_sensitivity_is_the_loss_with_one_rounded_layer(teacher: Captured) -> None:
    """Against a network whose weight was rounded directly; the teacher stays unchanged."""
    folded = fold_batch_norms(teacher)
    before = {name: t.clone() for name, t in folded.network.state_dict().items()}
    images = networks.images(12)
    layers = free_layers(folded, Scheme(Bits(4, 8), "full"))
    loss = divergence(folded)
    costs = sensitivities(folded, layers, images, loss=loss)
    assert list(costs) == ["conv1", "conv2", "fc"]
    assert all(cost[2] >= cost[4] >= cost[8] >= 0 for cost in costs.values())
    assert all(torch.equal(t, before[name]) for name, t in folded.network.state_dict().items())

    model = networks.make("Residual")
    with torch.no_grad():
        original = model(images)
        weight = model.get_parameter("fc.weight")
        scale, zero_point = best_weight_grid(weight, 2, *_layout(layers["fc"][0]))
        weight.copy_(fake_quantize(weight, scale, zero_point, 2))
        rounded = model(images)
        expected = float(loss(rounded, original))
    assert costs["fc"][2] == pytest.approx(expected, rel=1e-4)
    other = sensitivities(folded, layers, images, loss=lambda a, b: (a - b).abs().max())
    assert other["fc"][2] == pytest.approx(float((rounded - original).abs().max()), rel=1e-4)


def test_sensitivities_do_not_depend_on_the_memory_budget(teacher: Captured) -> None:
    """With a budget for five images, twelve pass in three parts."""
    folded = fold_batch_norms(teacher)
    layers = free_layers(folded, Scheme(Bits(4, 8), "full"))

    def loss(student: Tensor, expected: Tensor) -> Tensor:
        assert len(student) == len(expected) == 12
        return divergence(folded)(student, expected)

    whole = sensitivities(folded, layers, networks.images(12), loss=loss)
    five = MemoryBudget(5 * 4 * forward_bytes(folded.network.graph))
    with rows_of_calls() as rows:
        parts = sensitivities(folded, layers, networks.images(12), loss=loss, memory=five)
    assert set(rows) == {5, 2}
    for name, costs in whole.items():
        assert parts[name] == pytest.approx(costs, rel=1e-4)


def _layout(layer: fx.Node) -> tuple[Layout, int]:
    from gdfq.graph.queries import weight_layout

    return weight_layout(layer)


def file_of(result: QuantizedNetwork) -> bytes:
    """The ONNX file that a run with test images would write, without running it."""
    accuracy = {"teacher": 91.2345, "student": 90.0}
    return to_onnx(
        result.network, result.card.inputs, metadata_of(result.card, accuracy, safe=False)
    )


@pytest.mark.parametrize(
    ("name", "size", "near"), [("Shared", 4000, 512), ("Transposed", 4000, 64)]
)
def test_file_fits_in_the_size(name: str, size: int, near: int) -> None:
    """Also where a layer is used twice or has one scale; and its size is near the bound."""
    model = networks.make(name)
    result = gdfq.quantize(model, networks.images(1), "auto", SMALL, size=size, steps=4)
    chosen = result.metrics["allocation"]
    data = file_of(result)
    assert len(data) <= chosen["bytes"] <= size
    assert chosen["bytes"] - len(data) < near  # a layer that is used twice may share its numbers
    named = {name for name, bits in chosen["bits"].items() if bits != 4}
    assert {text.rpartition("=")[0] for text in result.card.layer_bits} == named


def test_error_of_a_small_size_gives_the_smallest_size(teacher: Captured, tmp_path: Path) -> None:
    options: dict[str, Any] = {"recipe": SMALL, "steps": 4, "layer_bits": ["fc=6"]}
    with pytest.raises(UsageError, match=r"smallest possible size is \d+ bytes; got 2000") as error:
        gdfq.quantize(teacher, networks.images(1), "auto", size=2000, **options)
    smallest = int(str(error.value).split(" bytes")[0].split()[-1])
    result = gdfq.quantize(teacher, networks.images(1), "auto", size=smallest, **options)
    assert len(file_of(result)) <= result.metrics["allocation"]["bytes"] == smallest

    bits = result.metrics["allocation"]["bits"]
    assert set(bits) == {"conv1", "conv2"}  # fc has layer bits
    assert result.card.layer_bits[0] == "fc=6"
    result.save(tmp_path)
    again = gdfq.load(tmp_path)
    assert again.card == result.card
    found = {
        str(node.args[0].target).split(".")[1]: node.args[3]
        for node in again.network.graph.nodes
        if getattr(node.target, "__name__", "") == "dequantize"
    }
    assert found == bits | {"fc": 6}


def test_impossible_size_is_found_before_images_are_made(teacher: Captured) -> None:
    steps: list[Step] = []
    with pytest.raises(UsageError, match="smallest possible size"):
        gdfq.quantize(teacher, networks.images(1), "auto", SMALL, size=2000, listener=steps.append)
    assert not steps


def test_pool_images_are_made_once_and_are_those_of_the_recipe(teacher: Captured) -> None:
    made, images = FEW_IMAGES.made(teacher, context=Context(seed=3))
    assert isinstance(made, ImagePool)
    assert len(images) == 16
    for a, b in zip(
        FEW_IMAGES.stream(teacher, steps=4, context=Context(seed=3)),
        made.stream(teacher, steps=4, context=Context(seed=3)),
        strict=True,
    ):
        assert torch.equal(a.images, b.images)
        assert torch.equal(present(a.labels), present(b.labels))


def test_layer_bits_match_exact_names() -> None:
    assert LayerBits.exactly("a[0].*b", 2).matches("a[0].*b", 5, 9)
    assert not LayerBits.exactly("a[0].*b", 2).matches("a0.xb", 5, 9)
    assert LayerBits.exactly("first", 8).matches("first", 3, 9)
    assert not LayerBits.exactly("last", 8).matches("fc", 8, 9)
    for layer_bits in (LayerBits.exactly("last", 8), LayerBits("a.*", None)):
        assert LayerBits.parse(str(layer_bits)) == layer_bits


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": "auto"}, "belong together.*no --size was given"),
        ({"bits": "w4a4", "size": 4000}, "belong together.*'w4a4' and size 4000"),
        ({"bits": "auto", "size": 0}, "at least 1, or a text such as 300KB.* got 0"),
        (
            {"bits": "auto", "size": "3 apples"},
            "whole number of bytes, .*such as 300KB.*'3 apples'",
        ),
        ({"bits": "auto", "size": 4000, "recipe": "paper"}, "so a recipe with a pool"),
        ({"bits": "auto", "size": 4000, "layer_bits": ["*=4"]}, "all 3 of this network are"),
        ({"bits": "auto", "size": 4000, "layer_bits": ["nowhere=4"]}, "nowhere"),
    ],
)
def test_options_that_allow_no_choice_are_refused(
    teacher: Captured, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=f"(?s){message}"):
        gdfq.quantize(teacher, networks.images(1), **{"recipe": SMALL, "steps": 4, **options})


def test_command_line_prints_the_chosen_bits(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = ["--recipe", "quick", "--no-onnx"]
    assert main(arguments(place, *recipe, "--bits", "auto", "--size", "3.7KiB")) == 0
    config, metrics = (
        json.loads((place / "out" / name).read_text()) for name in ("config.json", "metrics.json")
    )
    assert (config["bits"], config["size"]) == ("auto", 3788)
    allocation = metrics["allocation"]
    assert allocation["size"] == 3788
    assert metrics["seconds"]["allocate"] > 0
    printed = capsys.readouterr().out
    for bits in set(allocation["bits"].values()):
        names = [name for name, chosen in allocation["bits"].items() if chosen == bits]
        assert f"{bits} bits    {counted(len(names), 'layer')}: {', '.join(names)}" in printed


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--bits", "auto"], "belong together"),
        (["--size", "300KB"], "belong together"),
        (["--bits", "auto", "--size", "300 apples"], "as 300KB; got '300 apples'"),
        (["--bits", "auto", "--size", "0"], "as 300KB; got '0'"),
        (["--bits", "auto", "--size", "3IB"], "as 300KB; got '3IB'"),
    ],
)
def test_command_line_refuses_invalid_sizes(
    place: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert main(arguments(place, *more)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("size", ["300KB", 300_000])
def test_size_is_text_or_bytes(size: str | int) -> None:
    assert resolve_method("auto", "fast", size=size).size == 300_000


@pytest.mark.parametrize(
    ("text", "size"),
    [("300KB", 300_000), ("1.5mib", 1_572_864), ("2 kib", 2048), ("77", 77), ("77B", 77)],
)
def test_size_option_parses_units(text: str, size: int) -> None:
    from gdfq.cli.types import Size

    assert Size().convert(text, None, None) == size
