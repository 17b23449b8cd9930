"""`.tflite` files against the student, in LiteRT with XNNPACK."""

import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import networks, real_networks
from support.choice import checked
from support.operator_table import FUNCTIONS, LAYERS, SHAPE
from support.small_runs import quantized_by_fast
from support.surrounded import Of, surrounded, teacher_of
from torch import Tensor, nn

from gdfq import GdfqError, UsageError
from gdfq.deploy.litert.carriers import carriers_of
from gdfq.deploy.litert.flatbuffer import schema
from gdfq.deploy.litert.runtime import LiteInterpreter, litert_runner, litert_values
from gdfq.deploy.litert.target import LITERT
from gdfq.deploy.litert.writer import to_litert, unsupported
from gdfq.deploy.parity import compare_codes
from gdfq.functional.grid import Bits
from gdfq.graph.capture import Captured, capture
from gdfq.graph.inputs import InputSpec
from gdfq.models.registry import load_weights_
from gdfq.quantized import QuantizedNetwork
from gdfq.sources.base import Batch
from gdfq.student.build import build_student
from gdfq.student.freeze import freeze
from gdfq.student.integer_network import IntegerNetwork
from gdfq.student.scheme import Placement, Scheme
from gdfq.tuning.calibrate import calibrate_

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ai_edge_litert") is None,
    reason="needs the optional library ai_edge_litert",
)
SHARED_NETWORKS = {
    "cifar10_resnet20": (3, 32, 32),
    "cifar10_resnet32": (3, 32, 32),
    "cifar100_resnet56": (3, 32, 32),
    "imagenet_mobilenetv1_025": (3, 224, 224),
}


def frozen(teacher: Captured, bits: str, shape: tuple[int, ...] = SHAPE) -> IntegerNetwork:
    """A calibrated student."""
    student = build_student(teacher, Scheme(Bits.parse(bits), "full"))
    images = networks.images(64, shape=shape)
    logits = teacher.network(images)
    outputs = logits if isinstance(logits, Tensor) else logits[0]
    calibrate_(student, [Batch((images,), outputs.flatten(1).argmax(1), logits)], steps=1)
    return freeze(student)


def check_equal(network: IntegerNetwork, shape: tuple[int, ...] = SHAPE) -> None:
    """All codes are the student's, and the outputs beside them, also far out of the range."""
    inputs = [InputSpec("images", shape)]
    names = [f"out{i}" for i in range(len(network.outputs(networks.images(1, shape=shape))))]
    written = to_litert(network, inputs, {}, names)
    images = networks.images(8, seed=3, shape=shape)
    for x in (images, 3 * images):
        found = litert_values(written.data, written.orders, [x])
        codes, expected = compare_codes(network, [x], found, carriers_of(network))
        # Floats are rounded otherwise: a number next to n + 1/2 may become either code.
        few = [one.differ * one.count <= max(1, one.count / 1000) for one in codes]
        assert [
            one for one, is_equal in zip(codes, few, strict=True) if one.wrong or not is_equal
        ] == []
        for name, output in zip(names, expected, strict=True):
            actual = torch.from_numpy(found[name].copy())
            torch.testing.assert_close(actual, output, rtol=1e-4, atol=1e-4)
    for count in (1, 3):  # the batch is dynamic
        actuals = litert_runner(written.data)(images[:count])
        for actual, output in zip(actuals, network.outputs(images[:count]), strict=True):
            assert actual.shape == output.shape


@pytest.mark.parametrize(("bits", "placement"), [("w4a4", "full"), checked(("w8a8", "relu"))])
@pytest.mark.parametrize(
    "name", [*networks.NETWORKS, "Detector", "Segmenter", "Audio", "Transformer"]
)
def test_litert_file_matches_the_student_for_every_network(
    name: str, bits: str, placement: Placement, tmp_path: Path
) -> None:
    if (name, placement) == ("Transformer", "relu"):
        pytest.skip("it has no ReLU")
    shape = networks.shape_of(name)
    quantized = quantized_by_fast(networks.captured(name), bits, placement, shape)
    exported = quantized.export(tmp_path / "q.tflite")
    assert exported.inside.relative_error < 1e-5
    assert exported.beyond.relative_error < 1e-4  # float sums of large numbers, in another order
    assert exported.differs_first == ()
    assert [path.name for path in tmp_path.iterdir()] == ["q.tflite"]


@pytest.mark.parametrize("weights", range(2, 9))
def test_litert_file_keeps_the_codes_of_all_bits(weights: int, tmp_path: Path) -> None:
    bits = Bits(weights, 10 - weights)
    quantized = quantized_by_fast(networks.captured("Branches"), str(bits))
    exported = quantized.export(tmp_path / "q.tflite")
    assert exported.inside.agreement == exported.beyond.agreement == 100
    assert exported.differs_first == ()
    assert exported.notes[0].startswith("maps are [N, H, W, C]")
    stored = constants_of((tmp_path / "q.tflite").read_bytes())
    weight = next(w for w in quantized.network.weights if w.name == "grouped")
    offsets = (weight.codes - weight.zero_point).permute(0, 2, 3, 1)
    assert np.array_equal(stored["grouped.weight"], offsets.numpy())
    depthwise = next(w for w in quantized.network.weights if w.name == "depthwise")
    offsets = (depthwise.codes - depthwise.zero_point).permute(1, 2, 3, 0)
    assert np.array_equal(stored["depthwise.weight"], offsets.numpy())
    for grid in quantized.network.activations:
        carrier = carriers_of(quantized.network)[grid.name]
        assert carrier.lowest == 128 - 2**grid.bits  # the highest code is 127


def constants_of(data: bytes) -> dict[str, np.ndarray[Any, Any]]:
    """The int8 constants of a file by name."""
    model = schema().ModelT.InitFromPackedBuf(data)
    (graph,) = model.subgraphs
    return {
        tensor.name.decode(): np.array(model.buffers[tensor.buffer].data, np.uint8)
        .view(np.int8)
        .reshape(tensor.shape)
        for tensor in graph.tensors
        if tensor.type == schema().TensorType.INT8 and model.buffers[tensor.buffer].data is not None
    }


@pytest.mark.check
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", LAYERS)
def test_litert_operator_gives_the_codes_of_the_student(name: str) -> None:
    teacher = surrounded(LAYERS[name](), SHAPE)
    for bits in ("w8a8", "w3a4"):
        check_equal(frozen(teacher, bits))


@pytest.mark.check
@pytest.mark.parametrize("name", FUNCTIONS)
def test_litert_function_gives_the_codes_of_the_student(name: str) -> None:
    teacher = surrounded(Of(FUNCTIONS[name]), SHAPE)
    for bits in ("w8a8", "w4a5"):
        check_equal(frozen(teacher, bits))


class Flat(nn.Module):
    """Linear layers behind a flattened map, and on its last dimension; two outputs, one a map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(SHAPE[0], 3, 3, 2, 1)
        self.fc = nn.Linear(3 * 6 * 5, 7)
        self.columns = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = F.relu(self.stem(x))
        return self.fc(x.flatten(1)), F.relu(self.columns(x)), x


@pytest.mark.parametrize("bits", ["w8a8", "w4a4"])
def test_litert_linear_layers_read_the_columns_of_a_map(bits: str) -> None:
    network = frozen(teacher_of(Flat(), SHAPE), bits)
    check_equal(network)
    inputs = [InputSpec("images", SHAPE)]
    data = to_litert(network, inputs, {}, ["a", "b", "c"]).data
    kinds = [d["op_name"] for d in LiteInterpreter(data).interpreter._get_ops_details()]
    assert kinds.count("TRANSPOSE") == 2  # around the second linear layer alone


@pytest.mark.check
@pytest.mark.parametrize("bits", ["w8a8", "w4a8", "w4a4"])
@pytest.mark.parametrize("name", SHARED_NETWORKS)
def test_litert_file_of_a_real_network_has_the_codes_of_the_student(
    name: str, bits: str, shared: Path
) -> None:
    shape = SHARED_NETWORKS[name]
    model = getattr(real_networks, name)()
    load_weights_(model, shared / "models" / f"{name}.safetensors")
    teacher = capture(model.eval(), torch.zeros(1, *shape))
    check_equal(frozen(teacher, bits, shape), shape)


def test_litert_inputs_and_outputs_have_channels_last(tmp_path: Path) -> None:
    quantized = quantized_by_fast(networks.captured("Segmenter"), "w8a8")
    quantized.export(tmp_path / "q.tflite")
    loaded = LiteInterpreter((tmp_path / "q.tflite").read_bytes())
    (image,), (scores,) = loaded.inputs, loaded.outputs
    assert (image["name"], image["dtype"]) == ("images", np.float32)
    assert list(image["shape_signature"]) == [-1, 8, 8, 3]
    assert (scores["name"], scores["dtype"]) == ("output", np.float32)
    assert list(scores["shape_signature"]) == [-1, 8, 8, 3]
    signatures = loaded.interpreter.get_signature_list()
    assert signatures == {"serving_default": {"inputs": ["images"], "outputs": ["output"]}}


def test_litert_raw_input_takes_pixels(small: QuantizedNetwork, tmp_path: Path) -> None:
    exported = small.export(tmp_path / "q.tflite", raw_input=True)
    assert exported.beyond.images == exported.inside.images + 2  # black and white
    assert exported.beyond.relative_error < 1e-3
    loaded = LiteInterpreter((tmp_path / "q.tflite").read_bytes())
    assert loaded.inputs[0]["dtype"] == np.uint8
    pixels = torch.randint(256, (5, *networks.SHAPE), dtype=torch.uint8)
    expected = small(small.card.preprocessing(pixels))
    torch.testing.assert_close(
        torch.from_numpy(loaded([pixels])["logits"]), expected, rtol=1e-3, atol=1e-3
    )


def test_litert_file_has_metadata(small: QuantizedNetwork, tmp_path: Path) -> None:
    small.export(tmp_path / "q.tflite")
    model = schema().ModelT.InitFromPackedBuf((tmp_path / "q.tflite").read_bytes())
    found = {
        entry.name.decode(): bytes(model.buffers[entry.buffer].data).decode()
        for entry in model.metadata
    }
    assert (found["bits"], found["input_shape"]) == ("w4a4", "3x8x8")
    assert not {"onnxruntime", "layer_bits"} & set(found)  # of another runtime; empty


def test_litert_network_runs_whole_in_xnnpack(small: QuantizedNetwork, tmp_path: Path) -> None:
    """An operator outside would split the network, and TensorFlow Lite's kernels round otherwise."""
    small.export(tmp_path / "q.tflite")
    loaded = LiteInterpreter((tmp_path / "q.tflite").read_bytes())
    loaded([networks.images(2)])
    kinds = [detail["op_name"] for detail in loaded.interpreter._get_ops_details()]
    assert kinds.count("DELEGATE") == 1
    assert kinds.count("CONV_2D") == 2
    # The map that is narrowed, the mean's input, the input and the weight of the last layer.
    assert kinds.count("DEQUANTIZE") == 4


def test_litert_codes_that_differ_are_refused(
    small: QuantizedNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = litert_values
    path = tmp_path / "q.tflite"
    path.write_bytes(b"before")

    def shifted(*arguments: Any) -> Any:
        return {n: v - (n == "relu_1.q") for n, v in real(*arguments).items()}

    monkeypatch.setattr("gdfq.deploy.litert.target.litert_values", shifted)
    with pytest.raises(GdfqError, match=r"from equal inputs: 100.00% of 'relu_1\.q'"):
        small.export(path)
    assert path.read_bytes() == b"before"


def test_litert_refuses_operators_without_a_form_by_layer(tmp_path: Path) -> None:
    quantized = quantized_by_fast(
        networks.captured("Volume"), "w8a8", shape=networks.shape_of("Volume")
    )
    with pytest.raises(
        UsageError, match=r"stem\.0 \(.* 3 dimensions\), .*\(upsample_nearest3d\).*another target"
    ):
        quantized.export(tmp_path / "q.tflite")
    assert list(tmp_path.iterdir()) == []


REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "dilated_pooling": (lambda x: F.max_pool2d(x, 3, 1, 1, 2), "maximum pooling with dilation"),
    "part_of_the_batch": (lambda x: x[-1:].expand_as(x), "a part of the batch"),
    "flipped_batch": (lambda x: x.flip(0), "an operator on entries of the batch"),
    "function": (lambda x: torch.erf(x), "erf"),
    "three_dimensions": (lambda x: F.avg_pool3d(x[:, None], 2)[:, 0], "avg_pool3d"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_litert_refusal_names_the_operator_before_a_run(name: str) -> None:
    function, reason = REFUSED[name]
    teacher = surrounded(Of(function), SHAPE)
    found = unsupported(teacher.network.graph)
    assert any(re.fullmatch(rf"\S+ \({reason}\)", text) for text in found), found
    with pytest.raises(UsageError, match=rf"a form in a file of target 'litert'.*{reason}"):
        LITERT.check_scheme(teacher, Scheme(Bits(8, 8), "full"))
    assert unsupported(surrounded(nn.ReLU(), SHAPE).network.graph) == []


def test_litert_without_its_package_is_a_clear_error(
    small: QuantizedNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ai_edge_litert", None)
    with pytest.raises(UsageError, match=r"Install gdfq\[litert\]"):
        small.export(tmp_path / "q.tflite")
    assert LITERT.suffix == ".tflite"
