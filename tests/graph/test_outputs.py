"""Structures of outputs, and networks whose outputs are not classes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import networks
from support.choice import checked
from support.narrowing import instance
from torch import Tensor, nn

import gdfq
from gdfq import UsageError
from gdfq.functional.grid import Bits
from gdfq.graph.capture import capture
from gdfq.graph.outputs import built, count_of, flattened, names_of, read_structure, structure_of
from gdfq.quantized import QuantizedNetwork
from gdfq.recipes import FAST, Recipe, find_recipe
from gdfq.sources.pixels import OptimisedSource
from gdfq.sources.pool import ImagePool
from gdfq.sources.spectral import SpectralSource
from gdfq.student.placement import activation_bits
from gdfq.student.scheme import Scheme


def test_structure_matches_hand_made_outputs() -> None:
    a, b, c = (torch.full((1,), float(i)) for i in range(3))
    value = {"x": a, "y": (b, [c])}
    assert [float(t) for t in flattened(value)] == [0, 1, 2]
    assert structure_of(value) == {"x": 0, "y": [1, [2]]}
    assert built({"x": 0, "y": [1, [2]]}, [a, b, c]) == {"x": a, "y": (b, (c,))}
    assert names_of({"x": 0, "y": [1, [2]]}, "one") == ["x", "y.0", "y.1.0"]
    assert names_of([0, 1], "one") == ["output.0", "output.1"]
    assert names_of({"x": 0}, "one") == names_of(0, "one") == ["one"]
    assert names_of({"images": 0, "a": [1], "a.0": 2}, "one") == ["output.images", "a.0", "a.0_"]
    holes = (a, None, {"x": None, "y": b})
    assert structure_of(holes) == [0, None, {"x": None, "y": 1}]
    assert read_structure([0, None, {"x": None, "y": 1}]) == structure_of(holes)
    assert built(structure_of(holes), [a, b]) == holes
    assert names_of(structure_of(holes), "one") == ["output.0", "output.2.y"]
    assert count_of(structure_of(holes)) == 2
    with pytest.raises(UsageError, match="must differ as text"):
        structure_of({1: a, "1": b})


VALUES = st.recursive(
    st.just(torch.zeros(1)),
    lambda inner: (
        st.lists(inner, min_size=1, max_size=3).map(tuple)
        | st.dictionaries(st.text("abc", min_size=1, max_size=2), inner, min_size=1, max_size=3)
    ),
    max_leaves=6,
)


@given(VALUES)
def test_structure_round_trips_through_a_file(value: object) -> None:
    tensors = [torch.full((1,), float(i)) for i in range(len(flattened(value)))]
    structure = structure_of(value)
    assert read_structure(structure) == structure
    assert count_of(structure) == len(tensors)
    assert flattened(built(structure, tensors)) == tensors
    names = names_of(structure, "one")
    assert len(set(names)) == len(tensors)


@pytest.mark.parametrize(
    "value", [True, "0", None, [], [0, 0], [1, 0], {"x": 2}, {"x": None}, [0, [["a"]]]]
)
def test_structure_must_place_each_output_once(value: Any) -> None:
    with pytest.raises(ValueError, match="output"):
        read_structure(value)


def tuned(name: str, recipe: Recipe, **options: Any) -> tuple[nn.Module, QuantizedNetwork]:
    model = networks.make(name)
    example = torch.zeros(1, *networks.shape_of(name))
    # Audio's three numbers look like logits and are none.
    options |= {"classifier": False}
    return model, gdfq.quantize(model, example, "w4a8", recipe, seed=0, **options)


FEW = replace(
    FAST.with_steps(12),
    source=replace(
        instance(FAST.source, ImagePool), images=16, source=SpectralSource(16, 4), batch=8
    ),
)


@pytest.mark.parametrize(
    "name", [name if name == "Detector" else checked(name) for name in networks.TASKS]
)
def test_any_output_is_tuned_saved_loaded_and_exported(name: str, tmp_path: Path) -> None:
    test = networks.images(64, seed=3, shape=networks.shape_of(name))
    model, quantized = tuned(name, FEW, test=test)
    with torch.no_grad():
        expected, actual = (flattened(network(test)) for network in (model, quantized))
    errors = quantized.metrics["student"]["error_percent"]
    for error, ours, theirs in zip(errors.values(), actual, expected, strict=True):
        by_hand = float(100 * (ours - theirs).norm() / theirs.norm())
        assert error == pytest.approx(by_hand, abs=0.01)
        assert by_hand < 30
    quantized.save(tmp_path)
    loaded = gdfq.load(tmp_path)
    assert loaded.card == quantized.card
    for ours, theirs in zip(flattened(loaded(test)), actual, strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(UsageError, match="accuracy is for classifiers"):
        loaded.evaluate((test, torch.zeros(64)))
    for format in ("onnx", "pt2", "safetensors"):
        exported = loaded.export(tmp_path / f"q.{format}")
        assert exported.inside.agreement is None
        assert exported.inside.typical_error < 1e-3
    session = onnxruntime.InferenceSession(tmp_path / "q.onnx")
    assert [output.name for output in session.get_outputs()] == {
        "Detector": ["boxes.0", "boxes.1", "scores"],
        "Segmenter": ["output"],
        "Audio": ["output"],
        "Volume": ["output.0", "output.1"],
    }[name]


def test_dictionary_of_outputs_is_returned_as_a_dictionary() -> None:
    _, quantized = tuned("Detector", FEW)
    returned = quantized(networks.images(2))
    assert set(returned) == {"boxes", "scores"}
    assert [tuple(boxes.shape) for boxes in returned["boxes"]] == [(2, 4, 64), (2, 4, 16)]


@pytest.mark.parametrize("name", ["paper", "zeroq"])
def test_source_needs_no_classes(name: str, tiny: Recipe) -> None:
    recipe = {"paper": tiny, "zeroq": find_recipe("zeroq")}[name]
    if name == "zeroq":
        recipe = replace(
            recipe, source=replace(instance(recipe.source, OptimisedSource), batch=4, iterations=2)
        )
    teacher = networks.captured("Segmenter")
    for batch in recipe.source.stream(teacher, steps=2):
        assert batch.labels is None
        assert batch.teacher_logits is None
        assert "boundary" not in batch.losses
    _, quantized = tuned("Segmenter", recipe)
    assert quantized(networks.images(2)).shape == (2, 3, 8, 8)


class Returning(networks.Detector):
    """A detector that returns a feature map beside, one map twice, and boxes in pixels."""

    def forward(self, x: Tensor) -> dict[str, object]:
        found = super().forward(x)
        fine = self.stem(x)
        boxes = found["boxes"]
        assert isinstance(boxes, list | tuple)
        pixels = (torch.cat(boxes, 2).sigmoid() * 2 - 0.5) * 8
        return {"conv2d": fine, "boxes": pixels, "again": fine}


def test_operators_that_only_shape_outputs_stay_float(tmp_path: Path) -> None:
    model = Returning()
    model.load_state_dict(networks.make("Detector").state_dict())
    model.eval()
    teacher = capture(model, networks.images(1))
    assert teacher.outputs == {"conv2d": 0, "boxes": 1, "again": 2}
    widths = activation_bits(teacher, Scheme(Bits(4, 4), "full"))
    assert not any(node.name.startswith(("sigmoid", "mul", "sub", "cat")) for node in widths)
    assert {bits for node, bits in widths.items() if node.name.startswith("relu")} == {4}
    quantized = gdfq.quantize(model, networks.images(1), "w4a4", FEW)
    found = quantized(networks.images(4))
    assert torch.equal(found["conv2d"], found["again"])
    assert len(found["conv2d"].unique()) > 16  # as it was before it was rounded for the layers
    assert len(found["boxes"].unique()) > 16
    quantized.save(tmp_path)
    assert torch.equal(gdfq.load(tmp_path)(networks.images(4))["boxes"], found["boxes"])
    quantized.export(tmp_path / "q.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "q.onnx")
    assert [output.name for output in session.get_outputs()] == ["conv2d", "boxes", "again"]


class Auxiliary(networks.Residual):
    """A classifier that returns None where its training needs something."""

    def forward(self, x: Tensor) -> dict[str, Tensor | None]:  # type: ignore[override]
        return {"auxiliary": None, "logits": super().forward(x)}


def test_none_among_the_outputs_is_returned(tmp_path: Path) -> None:
    model = Auxiliary().eval()
    model.load_state_dict(networks.make("Residual").state_dict())
    quantized = gdfq.quantize(model, networks.images(1), "w8a8", FEW)
    assert quantized.card.classes == networks.CLASSES
    quantized.save(tmp_path)
    found = gdfq.load(tmp_path)(networks.images(2))
    assert found.keys() == {"auxiliary", "logits"}
    assert found["auxiliary"] is None
    assert found["logits"].shape == (2, networks.CLASSES)
    assert quantized.export(tmp_path / "q.onnx").inside.typical_error < 1e-3


def test_capture_refuses_a_network_that_returns_only_none() -> None:
    class Nothing(networks.Residual):
        def forward(self, x: Tensor) -> tuple[None]:  # type: ignore[override]
            return (None,)

    with pytest.raises(UsageError, match="returned no tensor"):
        capture(Nothing().eval(), networks.images(1))


def test_reconstruction_refuses_several_outputs() -> None:
    data = networks.images(128)
    with pytest.raises(UsageError, match="towards its one output; this one has 3"):
        tuned("Detector", find_recipe("genie").with_steps(4), data=data)


def test_generate_gives_images_without_labels(tmp_path: Path) -> None:
    images, labels = gdfq.generate(networks.make("Segmenter"), networks.images(1), 4, FEW)
    assert images.shape == (4, *networks.SHAPE)
    assert labels is None
