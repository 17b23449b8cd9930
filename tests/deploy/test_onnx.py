"""ONNX files against the student, in ONNX Runtime."""

import copy
import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from support import networks
from support.choice import checked, every_second
from support.small_runs import quantized_by_fast
from torch import nn

import gdfq
from gdfq import GdfqError, UsageError
from gdfq.deploy.onnx.session import onnx_session, run_once
from gdfq.deploy.runtimes import onnx_runner
from gdfq.functional.grid import Bits
from gdfq.quantized import QuantizedNetwork
from gdfq.recipes import Recipe, find_recipe
from gdfq.sources.given import GivenImages
from gdfq.sources.pool import ImagePool
from gdfq.student.scheme import Placement


@pytest.mark.parametrize("placement", ["full", checked("relu")])
@pytest.mark.parametrize("name", networks.NETWORKS)
def test_onnx_file_matches_the_student_for_every_network(
    name: str, placement: Placement, tiny: Recipe, tmp_path: Path
) -> None:
    quantized = gdfq.quantize(
        networks.captured(name), networks.images(1), "w4a4", tiny, placement=placement
    )
    exported = quantized.export(tmp_path / "q.onnx")
    assert exported.inside.typical_error < 1e-3
    assert exported.beyond.typical_error < 1e-3
    model = onnx.load(tmp_path / "q.onnx")
    assert {node.domain for node in model.graph.node} == {""}  # standard operators alone
    run = onnx_runner((tmp_path / "q.onnx").read_bytes())
    for count in (1, 3):  # the batch is dynamic
        (logits,) = run(networks.images(count))
        assert logits.shape == (count, networks.CLASSES)
    assert [path.name for path in tmp_path.iterdir()] == ["q.onnx"]


@pytest.mark.parametrize("weights", every_second(range(2, 9)))
def test_onnx_file_keeps_the_codes_of_all_bits(weights: int, tmp_path: Path) -> None:
    bits = Bits(weights, 10 - weights)
    quantized = quantized_by_fast(networks.captured("Branches"), str(bits))
    exported = quantized.export(tmp_path / "q.onnx")
    assert exported.inside.agreement == exported.beyond.agreement == 100
    model = onnx.load(tmp_path / "q.onnx")
    stored = {i.name: i for i in model.graph.initializer}
    kinds = {i.data_type for name, i in stored.items() if name.endswith(".weight")}
    expected = {2: onnx.TensorProto.INT2, 3: onnx.TensorProto.INT4, 4: onnx.TensorProto.INT4}
    depthwise = onnx.TensorProto.INT8
    assert kinds == {expected.get(weights, onnx.TensorProto.INT8), depthwise}
    assert model.opset_import[0].version == (25 if weights == 2 else 21)
    for name, tensor in stored.items():
        if name.endswith(".weight"):
            codes = quantized.network.module.get_buffer(f"quantized.{name[:-7]}.codes")
            values = onnx.numpy_helper.to_array(tensor).astype(np.int8)
            assert np.array_equal(values, codes.numpy())
    clips = [n for n in model.graph.node if n.name.endswith(".clip") and n.input[0].endswith(".q")]
    assert bool(clips) == (bits.activations < 8)


def test_full_placement_runs_in_integer_kernels(small: QuantizedNetwork, tmp_path: Path) -> None:
    """The graph after ONNX Runtime's optimization has no float convolution, addition or product."""
    small.export(tmp_path / "q.onnx")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "seen.onnx")
    onnxruntime.InferenceSession(tmp_path / "q.onnx", options, providers=["CPUExecutionProvider"])
    seen = [node.op_type for node in onnx.load(tmp_path / "seen.onnx").graph.node]
    assert seen.count("QLinearConv") == 2
    # One is the sum; one rounds the first ReLU's output, which is carried in 8 bits, for conv2.
    assert seen.count("QLinearAdd") == 2
    assert seen.count("QGemm") == 1
    assert not {"Conv", "Add", "Gemm", "Relu", "DequantizeLinear"} & set(seen)


def test_onnx_file_has_names_and_metadata(tmp_path: Path) -> None:
    quantized = quantized_by_fast(networks.captured("Residual"), "w4a8")
    quantized.metrics |= {"teacher": {"top1": 91.5}, "student": {"top1": 90.25}}
    quantized.export(tmp_path / "q.onnx")
    model = onnx.load(tmp_path / "q.onnx")
    facts = {entry.key: entry.value for entry in model.metadata_props}
    assert facts["bits"] == "w4a8"
    assert facts["classes"] == str(networks.CLASSES)
    assert facts["input_shape"] == "3x8x8"
    assert facts["top1_student"] == "90.2500"
    assert (facts["mean"], facts["std"]) == ("0,0,0", "1,1,1")
    assert (facts["gdfq"], facts["recipe"]) == (gdfq.__version__, "fast")
    assert [i.name for i in model.graph.input] == ["images"]
    assert [o.name for o in model.graph.output] == ["logits"]
    layers = [n.name for n in model.graph.node if n.op_type in {"Conv", "Gemm"}]
    assert layers == ["conv1", "conv2", "fc"]
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    text = (tmp_path / "q.onnx").read_bytes()
    assert b"/" not in text.replace(b"7-bit", b"") or b".py" not in text  # no paths of ours


def test_raw_input_takes_pixels(small: QuantizedNetwork, tmp_path: Path) -> None:
    exported = small.export(tmp_path / "q.onnx", raw_input=True)
    assert exported.beyond.images == exported.inside.images + 2  # black and white
    assert exported.beyond.relative_error < 1e-3
    session = onnx_session((tmp_path / "q.onnx").read_bytes())
    (first,) = session.get_inputs()
    assert first.type == "tensor(uint8)"
    pixels = torch.randint(256, (5, *networks.SHAPE), dtype=torch.uint8)
    actual = session.run(None, {"images": pixels.numpy()})[0]
    expected = small(small.card.preprocessing(pixels))
    torch.testing.assert_close(torch.from_numpy(actual), expected, rtol=1e-3, atol=1e-3)


def test_operator_without_an_onnx_form_is_named(
    small: QuantizedNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no ONNX function found for aten.weird")

    monkeypatch.setattr("torch.onnx.export", refuse)
    with pytest.raises(UsageError, match=r"aten\.weird.*safetensors or pt2"):
        small.export(tmp_path / "q.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.needs("openvino")
def test_openvino_gives_the_same_predictions(small: QuantizedNetwork, tmp_path: Path) -> None:
    """A second runtime, written independently."""
    import openvino

    small.export(tmp_path / "q.onnx")
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(tmp_path / "q.onnx"), "CPU")
    x = networks.images(16)
    actual = torch.from_numpy(compiled(x.numpy())[0])
    assert float((actual - small(x)).norm() / small(x).norm()) < 0.05


def test_runtime_does_not_round_float_layers_between_quantized_ones(tmp_path: Path) -> None:
    """Channels have very different sizes, so rounding them to 8 bits together would be visible."""
    model = networks.make("Residual")
    with torch.no_grad():
        model.get_parameter("conv2.weight")[0] *= 60
    recipe = dataclasses.replace(
        find_recipe("fast").with_steps(5), source=ImagePool(GivenImages(batch=16), 32, 16)
    )
    quantized = gdfq.quantize(
        model, networks.images(1), "w4a4", recipe, data=networks.images(32),
        layer_bits=["conv2=float"], placement="full",
    )  # fmt: skip
    exported = quantized.export(tmp_path / "q.onnx")
    assert exported.inside.relative_error < 1e-3
    assert exported.beyond.relative_error < 1e-3


def test_invalid_model_is_a_clear_error(
    small: QuantizedNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(model: nn.Module) -> None:
        raise onnx.checker.ValidationError("Graph must be in single static assignment form")

    monkeypatch.setattr("onnx.checker.check_model", refuse)
    with pytest.raises(GdfqError, match=r"valid ONNX model.*single static assignment"):
        small.export(tmp_path / "q.onnx")
    session = onnx_session(_identity())
    with pytest.raises(UsageError, match="run the file on these inputs"):
        run_once(session, None, {"x": np.zeros((2, 2), np.float32)})


def _identity() -> onnx.ModelProto:
    """A model that takes exactly three numbers."""
    value = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [3]) for n in "xy"]
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    graph = onnx.helper.make_graph([node], "g", value[:1], value[1:])
    opset = [onnx.helper.make_opsetid("", 21)]
    return onnx.helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString()


_MORE_WIDTHS = [
    ("w2a2", "Shuffled", "full"),
    ("w8a8", "Branches", "full"),
    ("w8a8", "Tokens", "relu"),
]


@pytest.mark.parametrize(("bits", "name", "placement"), _MORE_WIDTHS)
def test_fewest_and_most_bits_match_the_student(
    bits: str, name: str, placement: Placement, tmp_path: Path
) -> None:
    quantized = quantized_by_fast(networks.captured(name), bits, placement)
    exported = quantized.export(tmp_path / "q.onnx")
    assert exported.inside.relative_error < 1e-3
    assert exported.beyond.relative_error < 1e-3


def _with_statistics(network: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """The network in evaluation mode, its batch norms with statistics of noise."""
    with torch.no_grad():
        network.train()(torch.randn(64, *shape, generator=torch.Generator().manual_seed(3)))
    return network.eval()


def _of_dimensions(dimensions: int) -> nn.Module:
    """A convolution, its transpose, pooling, a residual path, in 1 to 3 dimensions."""
    nn = torch.nn
    convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dimensions - 1]
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dimensions - 1]
    pool = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[dimensions - 1]
    torch.manual_seed(dimensions)
    return nn.Sequential(
        *(convolution(2, 4, 3, padding=1, bias=False), norm(4), nn.ReLU()),
        # Depthwise and dilated.
        *(transposed(4, 4, 3, padding=2, dilation=2, groups=4), norm(4), nn.ReLU()),
        *(pool(1), nn.Flatten(), nn.Linear(4, 5)),
    )


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_networks_of_one_to_three_dimensions_match_the_student(
    dimensions: int, tmp_path: Path
) -> None:
    shape = (2, *[6] * dimensions)
    network = _with_statistics(_of_dimensions(dimensions), shape)
    quantized = quantized_by_fast(network, "w4a4", shape=shape)
    for name in ("q.onnx", "q.pt2"):
        exported = quantized.export(tmp_path / name)
        assert exported.inside.relative_error < 1e-3
        assert exported.beyond.relative_error < 1e-3


def test_zero_points_suit_signed_and_unsigned_activations(
    small: QuantizedNetwork, tmp_path: Path
) -> None:
    """After a ReLU, 0 is the lowest code; the input and the residual path have codes on both sides."""
    small.export(tmp_path / "q.onnx")
    graph = onnx.load(tmp_path / "q.onnx").graph
    values = {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer}
    found = {n.name: values[n.input[2]] for n in graph.node if n.op_type == "QuantizeLinear"}
    assert {value.dtype for value in found.values()} == {np.dtype(np.uint8)}
    assert found["relu.q"] == 0
    assert 0 < found["x.q"] < 255
    assert 0 < found["conv2d_1.q"] < 255


def test_channels_are_split_in_integers(tmp_path: Path) -> None:
    """Each output of an operator with several has a name, and codes are split."""
    quantized = quantized_by_fast(networks.captured("Shuffled"), "w4a4")
    exported = quantized.export(tmp_path / "q.onnx")
    assert not any("float" in note for note in exported.notes)
    splits = [n for n in onnx.load(tmp_path / "q.onnx").graph.node if n.op_type == "Split"]
    assert [len(n.output) for n in splits] == [2, 2]
    nodes = onnx.load(tmp_path / "q.onnx").graph.node
    codes = {n.output[0] for n in nodes if n.op_type in {"QuantizeLinear", "Clip"}}
    assert all(n.input[0] in codes for n in splits)


def test_ceiling_of_relu6_is_left_to_the_codes(tmp_path: Path) -> None:
    """A ReLU6 whose range the codes cover would keep the runtime from integer kernels."""
    model = networks.make("Branches")
    quantized = quantized_by_fast(model, "w4a4")
    exported = quantized.export(tmp_path / "q.onnx")
    assert not any("float" in note for note in exported.notes)
    with torch.no_grad():  # codes that reach further than 6: the ceiling counts
        for name, buffer in quantized.network.named_buffers():
            if "quantized.hardtanh" in name and name.endswith("scale"):
                buffer.fill_(1.0)
    exported = quantized.export(tmp_path / "q.onnx")
    assert exported.inside.relative_error < 1e-3
    note, _ = exported.notes
    assert note.startswith("computed in float: ")


def test_weight_with_one_scale_matches_the_student(small: QuantizedNetwork, tmp_path: Path) -> None:
    """No quantizer of this package makes such weights, but the format allows them."""
    network = copy.deepcopy(small.network)
    for name, buffer in list(network.named_buffers()):
        if name.endswith(".codes"):
            base = name.removesuffix("codes")
            for part in ("scale", "zero_point"):
                owner, _, leaf = f"{base}{part}".rpartition(".")
                old = network.get_buffer(f"{base}{part}")
                one = old.reshape(-1)[0].reshape([1] * buffer.ndim).clone()
                setattr(network.get_submodule(owner), leaf, one)
    quantized = gdfq.QuantizedNetwork(network, small.card, examples=small.examples)
    exported = quantized.export(tmp_path / "q.onnx")
    assert exported.inside.relative_error < 1e-3
    values = {i.name: i.dims for i in onnx.load(tmp_path / "q.onnx").graph.initializer}
    assert list(values["conv1.weight_scale"]) == list(values["conv1.bias_scale"]) == []


def test_mean_and_std_are_written_at_full_precision(
    small: QuantizedNetwork, tmp_path: Path
) -> None:
    from gdfq.data.preprocessing import Preprocessing

    third = Preprocessing((1 / 3,) * 3, (0.229000001,) * 3)
    card = dataclasses.replace(small.card, preprocessing=third)
    gdfq.QuantizedNetwork(small.network, card, examples=small.examples).export(tmp_path / "q.onnx")
    facts = {e.key: e.value for e in onnx.load(tmp_path / "q.onnx").metadata_props}
    assert [float(value) for value in facts["mean"].split(",")] == pytest.approx([1 / 3] * 3, 1e-8)
    assert facts["std"].split(",")[0] == "0.229000001"


class _Features(torch.nn.Module):
    """A backbone that returns its features, one of which the next layer reads too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.deep = torch.nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        first = torch.relu(self.stem(x))
        return first, first.flip(3), torch.relu(self.deep(first))


def test_activation_that_is_quantized_and_returned_stays_an_output(tmp_path: Path) -> None:
    """The quantizer clips as the ReLU does, but the ReLU is an output."""
    quantized = gdfq.quantize(
        _Features().eval(), networks.images(1), "w8a8", "real", data=networks.images(16), steps=4,
        placement="full",
    )  # fmt: skip
    exported = quantized.export(tmp_path / "q.onnx")
    assert exported.inside.typical_error < 1e-5


class _Expected(torch.nn.Module):
    """A softmax of a layer's outputs between quantizers; the layer's outputs are read alone or not."""

    def __init__(self, alone: bool) -> None:
        super().__init__()
        self.stem = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU())
        self.sides = torch.nn.Conv2d(8, 32, 1)
        self.bins = torch.nn.Conv2d(8, 1, 1, bias=False)
        self.alone = alone

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.sides(self.stem(x)).view(x.shape[0], 4, 8, -1).transpose(1, 2)
        expected = self.bins((2 * scores).softmax(1))
        return expected if self.alone else expected + self.bins(scores)


@pytest.mark.parametrize("alone", [True, False])
def test_softmax_between_quantizers_matches_the_student(alone: bool, tmp_path: Path) -> None:
    """ONNX Runtime rounds a softmax of codes otherwise (up to 8 % of the codes)."""
    torch.manual_seed(0)
    quantized = gdfq.quantize(
        _Expected(alone).eval(), networks.images(1), "w8a8", "real", data=networks.images(16),
        steps=4, placement="full",
    )  # fmt: skip
    exported = quantized.export(tmp_path / "q.onnx", safe_x86=True)
    assert exported.inside.relative_error < 1e-3
    assert exported.beyond.relative_error < 1e-3
    assert any("softmax" in note for note in exported.notes)
