"""Networks with several named inputs, integers among them, from capture to exported files."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import multi_input, networks
from support.narrowing import present
from torch import Tensor, nn

import gdfq
from gdfq import UsageError
from gdfq.data.tensors import load_tensors
from gdfq.deploy.onnx.session import onnx_session
from gdfq.generation.generation import Generation
from gdfq.graph.capture import capture
from gdfq.graph.inputs import InputSpec
from gdfq.quantized import QuantizedNetwork
from gdfq.runs.diagnostics import gather

IMAGE = InputSpec("image", (3, 8, 8))


def network_and_data(
    name: str, count: int = 64, seed: int = 1
) -> tuple[nn.Module, dict[str, Tensor]]:
    if name == "tokens":
        return multi_input.tokens(), multi_input.token_inputs(count, seed)
    integers = name == "integer time"
    inputs = multi_input.denoiser_inputs(count, integers, seed)
    return multi_input.denoiser(integers), inputs


NAMES = ["float time", "integer time", "tokens"]


Case = tuple[nn.Module, QuantizedNetwork, dict[str, Tensor], dict[str, Tensor]]
"""A network, its student, test inputs, and the same with labels where there are any."""


@pytest.fixture(scope="module", params=NAMES)
def case(request: pytest.FixtureRequest) -> Case:
    model, data = network_and_data(request.param)
    _, held_out = network_and_data(request.param, 40, seed=2)
    if request.param == "tokens":
        with torch.no_grad():
            held_out = {**held_out, "labels": model(**held_out).argmax(1)}
    recipe = dataclasses.replace(gdfq.RECIPES["real"].with_steps(12), placement="full")
    result = gdfq.quantize(model, data, "w8a8", recipe, data=data, test=held_out)
    inputs = {name: tensor for name, tensor in held_out.items() if name != "labels"}
    return model, result, inputs, held_out


@pytest.mark.parametrize("name", NAMES)
def test_inputs_are_named_as_in_the_forward_method(name: str) -> None:
    model, data = network_and_data(name, 3)
    captured = capture(model, data)
    assert [spec.name for spec in captured.inputs] == list(data)
    assert [spec.dtype for spec in captured.inputs] == [tensor.dtype for tensor in data.values()]
    assert [spec.shape for spec in captured.inputs] == [t.shape[1:] for t in data.values()]
    for given in (tuple(data.values()), dict(reversed(data.items()))):
        assert capture(model, given).inputs == captured.inputs
    _, others = network_and_data(name, 5, seed=3)
    expected = model(**others)
    found = captured.network(*others.values())
    for a, b in zip(
        found if isinstance(found, tuple) else [found],
        expected.values() if isinstance(expected, dict) else [expected],
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_input_spec_gives_its_kind() -> None:
    captured = capture(*network_and_data("integer time", 2))
    assert captured.inputs == (IMAGE, InputSpec("time", (), torch.int64))
    assert [spec.kind for spec in captured.inputs] == ["image", "integers"]
    with pytest.raises(UsageError, match=r"takes image: 3x8x8 image, time: scalar integers"):
        captured.input_shape  # noqa: B018


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: {"image": d["image"]}, "must fit the arguments"),
        (lambda d: tuple(d["image"].shape), r"must be tensors; got \(3, 3, 8, 8\)"),
        (lambda d: d["image"].shape, "must be tensors; got torch.Size"),
        (lambda _: "3x8x8", "must be tensors; got '3x8x8'"),
        (lambda _: 8, "must be tensors; got 8"),
        (lambda _: (), r"must be tensors; got \(\)"),
        (lambda d: {**d, "more": d["time"]}, "must fit the arguments"),
        (lambda d: {**d, "time": d["time"][:1]}, "one N for all"),
        (lambda d: {**d, "time": 3}, "time int"),
        (lambda d: {**d, "image": d["image"][..., :4, 0]}, "the network must accept inputs image"),
    ],
)
def test_capture_refuses_example_inputs_that_do_not_fit(
    change: Callable[[Any], Any], message: str
) -> None:
    model, data = network_and_data("float time", 3)
    with pytest.raises(UsageError, match=message):
        capture(model, change(data))


@pytest.mark.parametrize("given", [(1, 3, 8, 8), "3x8x8", 8])
def test_quantize_refuses_a_shape_in_place_of_example_inputs(given: Any) -> None:
    with pytest.raises(UsageError, match="example inputs must be tensors"):
        gdfq.quantize(networks.make("Residual"), given)


def test_capture_asks_for_the_inputs_that_are_missing_not_for_another_shape() -> None:
    model, data = network_and_data("float time", 3)
    with pytest.raises(UsageError, match="Give a tensor for each of its inputs: example_input"):
        capture(model, data["image"])
    with pytest.raises(UsageError, match="Give the shape it was trained on"):
        capture(model, (data["image"][..., :4, 0], data["time"]))


def test_quantized_network_takes_inputs_in_order_and_by_name(case: Case) -> None:
    model, result, inputs, _ = case
    expected = model(**inputs)
    found = result(**inputs)
    if isinstance(expected, dict):
        assert list(found) == list(expected)
    else:
        expected, found = {"logits": expected}, {"logits": found}
    for name, values in expected.items():
        assert (found[name] - values).norm() / values.norm() < 0.15
    first, *others = inputs.values()
    (second,) = others
    for again in (result(first, second), result(first, **{list(inputs)[1]: second})):
        values = again if isinstance(again, dict) else {"logits": again}
        assert all(torch.equal(values[name], found[name]) for name in found)
    with pytest.raises(UsageError, match="Give one tensor for each input"):
        result(first)


def test_quantize_measures_test_data_of_several_inputs(case: Case) -> None:
    _, result, _, held_out = case
    if "labels" in held_out:
        assert result.metrics["teacher"]["top1"] == 100
        assert result.metrics["student"]["top1"] > 80
        assert result.evaluate(held_out) == result.metrics["student"]["top1"]
    else:
        errors = result.metrics["student"]["error_percent"]
        assert set(errors) == {"noise", "level"}
        assert all(0 < error < 15 for error in errors.values())


def test_load_gives_the_saved_network(case: Case, tmp_path: Path) -> None:
    _, result, inputs, _ = case
    result.save(tmp_path)
    loaded = gdfq.load(tmp_path)
    assert loaded.card == result.card
    assert all(map(torch.equal, loaded.examples, result.examples))
    a, b = result(**inputs), loaded(**inputs)
    assert all(map(torch.equal, *(x.values() if isinstance(x, dict) else [x] for x in (a, b))))


@pytest.mark.parametrize("target", ["onnx", "pt2", "safetensors"])
def test_exported_file_gives_the_outputs_of_the_student(
    case: Case, target: str, tmp_path: Path
) -> None:
    _, result, inputs, _ = case
    path = tmp_path / f"student.{target}"
    exported = result.export(path)
    assert exported.target == target
    assert exported.inside.relative_error < 1e-3
    assert exported.beyond.relative_error < 1e-3
    if target == "onnx":
        session = onnx_session(path.read_bytes(), precise=True)
        assert [value.name for value in session.get_inputs()] == list(inputs)
        found = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
        expected = result(**inputs)
        for a, b in zip(
            found, expected.values() if isinstance(expected, dict) else [expected], strict=True
        ):
            # A rounding that falls the other way moves an output by a step of its grid.
            assert np.linalg.norm(a - b.numpy()) < 0.02 * np.linalg.norm(b.numpy())


def test_evidence_names_missing_sections_with_their_reason(case: Case) -> None:
    model, result, inputs, _ = case
    evidence = gather(capture(model, inputs), result)
    assert "layers" in evidence.sections
    names = [layer["name"] for layer in evidence.sections["layers"]["layers"]]
    assert len(names) == len(result.network.layers)
    for section in ("trust", "images"):
        assert "a network that takes images alone" in evidence.missing[section]


def test_stored_network_names_its_inputs_in_errors(case: Case, tmp_path: Path) -> None:
    _, result, inputs, _ = case
    result.export(tmp_path / "student.safetensors")
    from safetensors import safe_open

    with safe_open(tmp_path / "student.safetensors", "pt") as file:
        document = json.loads(file.metadata()["gdfq"])
    assert document["version"] == 5
    assert [entry["name"] for entry in document["card"]["inputs"]] == list(inputs)


def test_pool_recipe_takes_given_inputs() -> None:
    model, data = network_and_data("tokens")
    recipe = dataclasses.replace(gdfq.RECIPES["fast"].with_steps(10), placement="full")
    result = gdfq.quantize(model, data, "w8a8", recipe, data=data)
    with torch.no_grad():
        expected = model(**data)
    assert (result(**data) - expected).norm() / expected.norm() < 0.2


@pytest.mark.parametrize("recipe", ["fast", "quick", "paper", "zeroq"])
def test_image_source_refuses_networks_of_other_inputs(recipe: str) -> None:
    model, data = network_and_data("tokens", 4)
    with pytest.raises(
        UsageError, match=r"takes images alone.*ids: 6 integers.*give real inputs: data="
    ):
        gdfq.quantize(model, data, "w8a8", recipe)


def test_reconstruction_takes_several_inputs() -> None:
    model, data = network_and_data("tokens")
    recipe = dataclasses.replace(gdfq.RECIPES["genie"], placement="full")
    result = gdfq.quantize(model, data, "w8a8", recipe, data=data, steps=20)
    with torch.no_grad():
        expected = model(**data)
    assert (result(**data) - expected).norm() / expected.norm() < 0.2


def test_automatic_bits_refuse_several_inputs() -> None:
    model, data = network_and_data("tokens")
    with pytest.raises(UsageError, match=r"'auto' need .* takes images alone.*Give the bits"):
        gdfq.quantize(model, data, "auto", "fast", size=60_000, data=data)


def test_options_of_images_refuse_several_inputs() -> None:
    model, data = network_and_data("tokens")
    for options, words in (
        ({"mean": 0.5}, "mean, std and resize need .*Remove them"),
        ({"proxy": torch.rand(4, 3, 8, 8)}, "images from elsewhere need .*Remove the images"),
        (
            {"generate_with": Generation("diffusers:none", Path("none"))},
            "images from elsewhere need .*Remove the images",
        ),
    ):
        with pytest.raises(UsageError, match=words):
            gdfq.quantize(model, data, "w8a8", "quick", data=data, **options)


def test_raw_input_refuses_several_inputs(case: Case, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"raw input needs .*Remove raw_input"):
        case[1].export(tmp_path / "q.onnx", raw_input=True)


SPECS = {"ids": ((6,), torch.int64), "mask": ((6,), torch.bool)}


def test_load_tensors_reads_files_and_pairs(tmp_path: Path) -> None:
    data = multi_input.token_inputs(5)
    np.savez(
        tmp_path / "x.npz",
        labels=np.arange(4).repeat(2)[:5],
        **{n: t.numpy() for n, t in data.items()},  # type: ignore[arg-type]
    )
    read = load_tensors(tmp_path / "x.npz", SPECS, 4)
    assert present(read.labels).tolist() == [0, 0, 1, 1, 2]
    pair = load_tensors((data, read.labels), SPECS, 4)
    for loaded in (read, pair):
        assert len(loaded) == 5
        chosen = loaded.inputs(torch.tensor([3, 0]))
        assert all(torch.equal(a, b[[3, 0]]) for a, b in zip(chosen, data.values(), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: {"ids": d["ids"]}, "a tensor for each input of the network, ids, mask"),
        (lambda d: {**d, "other": d["ids"]}, "got ids, mask, other"),
        (lambda d: {**d, "ids": d["ids"][:, :4]}, r"shape \['N', 6\]"),
        (lambda d: {**d, "ids": d["ids"].float()}, "must be torch.int64"),
        (lambda d: {**d, "mask": d["mask"].long()}, "must be torch.bool"),
        (lambda d: {**d, "mask": d["mask"][:2]}, "same number of entries"),
        (lambda d: {n: t[:0] for n, t in d.items()}, "at least one"),
        (lambda d: {**d, "labels": torch.tensor([0, 1, 2, 3, 4])}, "must lie in 0..3"),
        (lambda d: {**d, "labels": torch.tensor([0, 1])}, "one label for each"),
        (lambda d: d["ids"], "must be a mapping"),
        (lambda d: "nowhere.npz", "readable .npz file"),
    ],
)
def test_load_tensors_refuses_tensors_that_do_not_fit(
    change: Callable[[Any], Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        load_tensors(change(multi_input.token_inputs(5)), SPECS, 4)


def test_network_of_one_image_has_one_input_spec() -> None:
    captured = networks.captured("Residual")
    assert captured.inputs == (InputSpec("images", networks.SHAPE),)
    assert captured.input_shape == networks.SHAPE
