"""The targets for devices that are not here: their files follow the rules, and have the numbers."""

import collections
import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from support import networks
from support.choice import every_second
from support.devices import for_target
from torch import Tensor, nn

import gdfq
from gdfq import TARGETS, GdfqError, UsageError
from gdfq.cli import main
from gdfq.deploy.onnx import pairs
from gdfq.deploy.onnx.devices import TENSORRT_RULES
from gdfq.deploy.runtimes import onnx_runner
from gdfq.deploy.target import Target
from gdfq.graph.capture import capture
from gdfq.quantized import QuantizedNetwork

TENSORRT = TARGETS["tensorrt"]
NAMES = ("Branches", "Borders", "Preactivation", "Tokens")
"""ReLU6 and concatenation; padding, pooling and a transposed convolution; products of two
activations and several outputs; a linear layer of tokens."""


@functools.cache
def student(name: str, bits: str, target: str) -> QuantizedNetwork:
    return for_target(networks.captured(name), bits, target)


def exported(quantized: QuantizedNetwork, target: Target, folder: Path) -> Any:
    path = folder / target.file_name
    quantized.export(path, target=target)
    return onnx.load(path)


def kinds(model: Any) -> collections.Counter[str]:
    return collections.Counter(node.op_type for node in model.graph.node)


@pytest.mark.parametrize(
    ("name", "bits"),
    every_second([("Residual", "w8a8"), *zip(NAMES, ["w4a8"] * 4, strict=True)]),
)
def test_file_for_tensorrt_has_int8_codes_and_zero_points_of_zero(
    name: str, bits: str, tmp_path: Path
) -> None:
    """Read from the written file, without the package's own rules."""
    model = exported(student(name, bits, "tensorrt"), TENSORRT, tmp_path)
    constants = {c.name: onnx.numpy_helper.to_array(c) for c in model.graph.initializer}
    assert {array.dtype.name for array in constants.values()} <= {"float32", "int8", "int64"}
    makers = {value: node for node in model.graph.node for value in node.output}
    weights = 0
    for node in model.graph.node:
        for value in node.input:
            maker = makers.get(value)
            if maker is not None and maker.op_type == "QuantizeLinear":
                assert node.op_type == "DequantizeLinear"
                assert node.input[1:] == maker.input[1:]
        if node.op_type in {"QuantizeLinear", "DequantizeLinear"}:
            zero_point = constants[node.input[2]]
            assert zero_point.dtype == np.int8
            assert not zero_point.any()
            assert (constants[node.input[1]] > 0).all()
            weights += node.input[0] in constants
    quantized = student(name, bits, "tensorrt")
    # A layer that is called twice has one weight.
    codes = {weight.codes.numpy().tobytes() for weight in quantized.network.weights}
    assert weights == len(codes)
    assert kinds(model).keys().isdisjoint({"Cast", "Clip", "QLinearConv", "ConvInteger"})
    assert 13 <= model.opset_import[0].version <= 20


def test_file_for_tensorrt_is_the_student_in_the_reference_evaluator(tmp_path: Path) -> None:
    """The definition of ONNX, without ONNX Runtime. Its sums are of floats."""
    quantized = student("Residual", "w8a8", "tensorrt")
    model = exported(quantized, TENSORRT, tmp_path)
    model.opset_import[0].version = 19  # the evaluator has no older DequantizeLinear
    images = quantized.examples[0][:8]
    for inputs in (images, 3 * images):
        (logits,) = ReferenceEvaluator(model).run(None, {"images": inputs.numpy()})
        expected = quantized.network(inputs)
        torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-5)


def test_file_for_tensorrt_keeps_its_relu_and_needs_no_relu6(tmp_path: Path) -> None:
    """The last code of a ReLU6 saturates at 6; a clamp at -1 and 1 is that of the codes."""

    class Clamps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(3, 3, 1) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = 9 * nn.functional.relu6(9 * self.a(x))
            x = nn.functional.hardtanh(9 * self.b(x))
            return self.c(x).clamp(-0.5, 2.0).mean((2, 3))

    torch.manual_seed(0)
    teacher = capture(Clamps(), networks.images(1))
    model = exported(for_target(teacher, "w8a8", "tensorrt"), TENSORRT, tmp_path)
    found = kinds(model)
    assert found["Relu"] == 1
    # Clamps in floats: that of other ends than the codes have, and, at most, one of equal ends.
    assert found["Clip"] + found["Min"] + found["Max"] <= 4


Edit = Callable[[Any], None]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file for TensorRT that keeps all rules."""
    model = exported(
        student("Residual", "w8a8", "tensorrt"), TENSORRT, tmp_path_factory.mktemp("s")
    )
    data: bytes = model.SerializeToString()
    assert pairs.broken(TENSORRT_RULES, data) == []
    return data


def _shift_zero_point(model: Any) -> None:
    (name,) = {n.input[2] for n in model.graph.node if n.name == "relu.q"}
    _set(model, name, lambda array: array + np.int8(1))


def _unsigned(model: Any) -> None:
    (name,) = {n.input[2] for n in model.graph.node if n.name == "relu.q"}
    _set(model, name, lambda array: array.astype(np.uint8))


def _set(model: Any, name: str, change: Callable[[Any], Any]) -> None:
    for constant in model.graph.initializer:
        if constant.name == name:
            array = change(onnx.numpy_helper.to_array(constant))
            constant.CopyFrom(onnx.numpy_helper.from_array(array, name))


def _clip_codes(model: Any) -> None:
    for index, node in enumerate(model.graph.node):
        if node.op_type == "DequantizeLinear" and node.input[0] == "relu.q":
            model.graph.node.insert(index, onnx.helper.make_node("Relu", ["relu.q"], ["clipped"]))
            node.input[0] = "clipped"
            return


def _integer_bias(model: Any) -> None:
    _set(model, "conv1.bias", lambda array: array.astype(np.int32))
    for index, node in enumerate(model.graph.node):
        if node.op_type == "Conv" and node.input[2] == "conv1.bias":
            made = onnx.helper.make_node(
                "DequantizeLinear", ["conv1.bias", "conv1.weight_scale"], ["b"], axis=0
            )
            node.input[2] = "b"
            model.graph.node.insert(index, made)
            return


def _wrong_axis(model: Any) -> None:
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "DequantizeLinear" and attribute.name == "axis":
                attribute.i = 1
                return


def _float_input(model: Any) -> None:
    for node in model.graph.node:
        if node.op_type == "Conv":
            node.input[0] = "x"
            return


def _old_opset(model: Any) -> None:
    model.opset_import[0].version = 12


@pytest.mark.parametrize(("edit", "message"), [
    (_shift_zero_point, "the zero point is not 0"),
    (_unsigned, "codes are uint8"),
    (_clip_codes, "Relu reads codes"),
    (_integer_bias, "the bias is not float"),
    (_wrong_axis, "scales lie along axis 1 of the weight of Conv"),
    (_float_input, "the input of a quantized layer is not dequantized"),
    (_old_opset, "the opset is 12"),
], ids=lambda value: getattr(value, "__name__", ""))  # fmt: skip
def test_file_that_breaks_a_rule_is_not_kept(
    edit: Edit, message: str, sound: bytes, tmp_path: Path
) -> None:
    quantized = student("Residual", "w8a8", "tensorrt")
    model = onnx.load_from_string(sound)
    edit(model)
    data = model.SerializeToString()
    assert any(message in text for text in pairs.broken(TENSORRT_RULES, data))
    wrong = replace(TENSORRT, write=lambda _job: data)
    with pytest.raises(GdfqError, match="must follow its rules for quantization"):
        quantized.export(tmp_path / TENSORRT.file_name, target=wrong)
    assert list(tmp_path.iterdir()) == []


def test_network_that_does_not_fit_a_device_is_refused_by_layer(tmp_path: Path) -> None:
    teacher = networks.captured("Residual")
    with pytest.raises(UsageError, match=r"would give 4 bits in relu_1"):
        gdfq.quantize(teacher, None, "w4a4", "fast", target="tensorrt")
    with pytest.raises(UsageError, match=r"grouped \(transposed convolution in groups"):
        gdfq.quantize(networks.captured("Transposed"), None, "w8a8", "fast", target="tensorrt")
    with pytest.raises(UsageError, match="needs placement full"):
        gdfq.quantize(teacher, None, "w8a8", "fast", target="tensorrt", placement="relu")
    plain = student("Branches", "w8a8", "onnx")
    with pytest.raises(UsageError) as refused:
        plain.export(tmp_path / "q.tensorrt.onnx")
    text = str(refused.value)
    assert "zero points other than 0 in x, " in text
    assert "several grids in hardtanh_1 and conv2d_2 and cat" in text
    assert "again with --target tensorrt, or" in text


def test_other_targets_take_the_student_of_a_device(tmp_path: Path) -> None:
    quantized = student("Branches", "w4a8", "tensorrt")
    for name in ("onnx", "safetensors"):
        path = tmp_path / TARGETS[name].file_name
        assert quantized.export(path, target=name).path == path
    again = gdfq.load(tmp_path / "student.safetensors")
    exported(again, TENSORRT, tmp_path)


@pytest.mark.parametrize(("name", "device"), [("tensorrt", "TensorRT"), ("qnn", "QNN")])
def test_label_says_that_the_device_was_not_asked(
    name: str, device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    label = f"form checked, not run in {device}"
    target = TARGETS[name]
    found = student("Branches", "w8a8", name).export(tmp_path / target.file_name)
    assert found.target == name
    assert label in found.notes
    assert main(["targets"]) == 0
    assert label in capsys.readouterr().out


QNN = TARGETS["qnn"]


def _rounded_by(encodings: Any, model: Any) -> Any:
    """A float file with QuantizeLinear and DequantizeLinear where its encodings say so."""
    tensors = {
        name: entries
        for kind in ("activation_encodings", "param_encodings")
        for name, entries in encodings[kind].items()
    }
    channels_second = {n.input[1] for n in model.graph.node if n.op_type == "ConvTranspose"}
    nodes, constants = [], []
    present = {v.name for v in (*model.graph.input, *model.graph.initializer)}

    def rounds(name: str) -> None:
        entries = tensors[name]
        for entry in entries:
            low, high = (entry["scale"] * n for n in _codes_of(entry))
            assert (entry["min"], entry["max"]) == pytest.approx((low, high))
        by_channel = len(entries) > 1
        scale = np.array([entry["scale"] for entry in entries], np.float32)
        zeros = -np.array([entry["offset"] for entry in entries])
        if name in encodings["param_encodings"]:
            bits = {entry["bitwidth"] for entry in entries}
            zeros = zeros - 2 ** (bits.pop() - 1)
        zero_point = zeros.astype(np.int8 if name in encodings["param_encodings"] else np.uint8)
        for part, array in (("s", scale), ("z", zero_point)):
            array = array if by_channel else array[0]
            constants.append(onnx.numpy_helper.from_array(array, f"{name}.{part}"))
        grid = [f"{name}.s", f"{name}.z"]
        axis: Any = {"axis": int(name in channels_second)} if by_channel else {}
        nodes.append(onnx.helper.make_node("QuantizeLinear", [name, *grid], [f"{name}.q"], **axis))
        nodes.append(
            onnx.helper.make_node("DequantizeLinear", [f"{name}.q", *grid], [f"{name}.r"], **axis)
        )

    for name in tensors:
        if name in present:
            rounds(name)
    for node in model.graph.node:
        node.input[:] = [f"{name}.r" if name in tensors else name for name in node.input]
        nodes.append(node)
        for name in filter(tensors.__contains__, node.output):
            rounds(name)
    found = onnx.ModelProto()
    found.CopyFrom(model)
    del found.graph.node[:]
    found.graph.node.extend(nodes)
    found.graph.initializer.extend(constants)
    return found


def _codes_of(entry: Any) -> tuple[int, int]:
    """The lowest and the highest code minus zero point of an encoding."""
    return entry["offset"], 2 ** entry["bitwidth"] - 1 + entry["offset"]


def test_float_file_with_encodings_is_the_student(tmp_path: Path) -> None:
    """Rounding the tensors that the encodings name, as they say, gives the student's outputs."""
    quantized = student("Branches", "w4a8", "qnn")
    model = exported(quantized, QNN, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "student.qnn.onnx", "student.qnn-float.onnx", "student.qnn.encodings"
    }  # fmt: skip
    plain = onnx.load(tmp_path / "student.qnn-float.onnx")
    encodings = json.loads((tmp_path / "student.qnn.encodings").read_text())
    assert kinds(plain).keys().isdisjoint({"QuantizeLinear", "DequantizeLinear", "Cast"})
    params = {c.name: onnx.numpy_helper.to_array(c) for c in plain.graph.initializer}
    weights = {weight.name: weight for weight in quantized.network.weights}
    assert {f"{name}.weight" for name in weights} == set(encodings["param_encodings"])
    for key, entries in encodings["param_encodings"].items():
        weight = weights[key.removesuffix(".weight")]
        assert {entry["bitwidth"] for entry in entries} == {4 if weight.bits <= 4 else 8}
        values = torch.from_numpy(params[key].copy())
        codes = (values / weight.scale).round()
        assert torch.equal(codes, weight.codes.float())
        assert [entry["scale"] for entry in entries] == weight.scale.flatten().tolist()
    tensors = {n for node in plain.graph.node for n in node.output} | {"images"}
    assert set(encodings["activation_encodings"]) <= tensors
    images = quantized.examples[0]
    run = onnx_runner(_rounded_by(encodings, plain).SerializeToString(), as_written=True)
    for inputs in (images, 3 * images):
        for expected, actual in zip(quantized.network.outputs(inputs), run(inputs), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
    assert len(kinds(model)) > 3


def test_file_for_qnn_has_uint8_codes_and_symmetric_weights(tmp_path: Path) -> None:
    """Read from the written file, without the package's own rules."""
    model = exported(student("Branches", "w4a8", "qnn"), QNN, tmp_path)
    constants = {c.name: onnx.numpy_helper.to_array(c) for c in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            assert constants[node.input[2]].dtype == np.uint8
        if node.op_type == "DequantizeLinear" and node.input[0] in constants:
            codes = constants[node.input[0]]
            assert codes.dtype.name in {"int8", "int32"}
            if codes.dtype == np.int8:
                most = 127 if "depthwise" in node.input[0] else 7
                assert most // 2 < np.abs(codes).max() <= most + 1
                assert not constants[node.input[2]].any()
    assert kinds(model).keys().isdisjoint({"Cast", "Sub"})
    # A MaxPool and a Pad, which only move values, are quantized on the grid before them.
    scales = {
        node.input[0]: node.input[1]
        for node in model.graph.node
        if node.op_type.endswith("eLinear")
    }
    (pool,) = (node for node in model.graph.node if node.op_type == "MaxPool")
    (before,) = (node for node in model.graph.node if node.output[0] == pool.input[0])
    assert scales[pool.output[0]] == before.input[1]
