"""Files of the target `openvino`, in OpenVINO."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from support import networks
from support.small_runs import quantized_by_fast
from torch import Tensor, nn

import gdfq
from gdfq import TARGETS, GdfqError, UsageError
from gdfq.deploy.onnx.target import write_onnx
from gdfq.deploy.openvino.target import OPENVINO
from gdfq.functional.grid import Bits
from gdfq.graph.capture import capture
from gdfq.quantized import QuantizedNetwork
from gdfq.recipes import Recipe
from gdfq.student.scheme import Scheme

needs_openvino = pytest.mark.needs("openvino")


def single_pools(path: Path) -> list[str]:
    """The inputs of poolings of one element."""
    return [
        node.input[0]
        for node in onnx.load(path).graph.node
        if node.op_type == "MaxPool" and [*node.attribute[0].ints] == [1, 1]
    ]


REFUSED = "Borders"
"""The network that has an average of windows beyond the border."""


@needs_openvino
def test_file_that_openvino_computes_otherwise_is_not_kept(tiny: Recipe, tmp_path: Path) -> None:
    teacher, image = networks.captured(REFUSED), networks.images(1)
    quantized = gdfq.quantize(teacher, image, "w4a4", tiny, placement="full")
    with pytest.raises(GdfqError, match=r"% of 'avg_pool2d.*It was not kept"):
        quantized.export(tmp_path / "q.openvino.onnx")
    assert list(tmp_path.iterdir()) == []


@needs_openvino
@pytest.mark.parametrize("name", [name for name in networks.NETWORKS if name != REFUSED])
def test_file_is_equal_in_openvino_for_every_network(
    name: str, tiny: Recipe, tmp_path: Path
) -> None:
    teacher, image = networks.captured(name), networks.images(1)
    OPENVINO.check_scheme(teacher, Scheme(Bits(4, 4), "full"))
    quantized = gdfq.quantize(teacher, image, "w4a4", tiny, placement="full")
    exported = quantized.export(tmp_path / "q.openvino.onnx")
    assert exported.target == "openvino"
    assert exported.inside.typical_error < 1e-3
    assert exported.beyond.typical_error < 1e-3


class Signed(nn.Module):
    """A factor for each channel, two of them negative, behind a pooling or beside a residual."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.stem, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, networks.CLASSES)
        self.factors = nn.Parameter(torch.tensor([-0.7, 1.2, 1.3, -2.4]).view(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        pooled = nn.functional.max_pool2d(x, 2)
        if self.kind == "product":
            y = pooled * self.factors
        elif self.kind == "quotient":
            y = nn.functional.relu6(pooled / self.factors)
        else:
            y = x * self.factors + x
        return self.fc(y.mean((2, 3)))


@needs_openvino
@pytest.mark.parametrize("kind", ["product", "quotient", "residual"])
def test_negative_factors_by_channel_are_equal(kind: str, tmp_path: Path) -> None:
    """Without a barrier OpenVINO multiplies all channels by the first factor."""
    torch.manual_seed(0)
    quantized = quantized_by_fast(Signed(kind).eval(), "w7a8")
    unseparated = replace(OPENVINO, write=write_onnx)
    with pytest.raises(GdfqError, match=r"% off for most inputs"):
        quantized.export(tmp_path / "q.openvino.onnx", target=unseparated)
    exported = quantized.export(tmp_path / "q.openvino.onnx")
    assert exported.inside.relative_error < 1e-5
    assert exported.beyond.relative_error < 1e-5
    assert any(
        "mul" in name or "div" in name for name in single_pools(tmp_path / "q.openvino.onnx")
    )


@needs_openvino
@pytest.mark.parametrize("weights", range(2, 8))  # 8 saturate without VNNI
def test_file_with_a_residual_is_equal_at_all_bits(weights: int, tmp_path: Path) -> None:
    bits = f"w{weights}a{10 - weights}"
    quantized = quantized_by_fast(networks.captured("Residual"), bits)
    exported = quantized.export(tmp_path / "q.openvino.onnx")
    assert exported.inside.agreement == exported.beyond.agreement == 100
    assert exported.beyond.typical_error < 1e-5
    assert len(single_pools(tmp_path / "q.openvino.onnx")) == 1


@needs_openvino
def test_default_file_with_a_residual_is_refused(small: QuantizedNetwork, tmp_path: Path) -> None:
    """OpenVINO adds the convolution's output before it is rounded."""
    fused = replace(OPENVINO, write=write_onnx)
    with pytest.raises(GdfqError, match=r"% off. It was not kept"):
        small.export(tmp_path / "q.openvino.onnx", target=fused)
    assert list(tmp_path.iterdir()) == []
    small.export(tmp_path / "q.openvino.onnx")


class Perceptron(nn.Module):
    """A residual of linear layers: its tensors [N, C] have no positions to pool."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(1)).relu()
        return self.last((self.second(x) + x).relu())


@needs_openvino
@pytest.mark.parametrize("bits", ["w7a8", "w4a4"])
def test_residual_without_positions_is_equal(bits: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    quantized = quantized_by_fast(Perceptron().eval(), bits, shape=(3, 2, 2))
    exported = quantized.export(tmp_path / "q.openvino.onnx")
    assert exported.beyond.typical_error < 1e-5
    kinds = [node.op_type for node in onnx.load(tmp_path / "q.openvino.onnx").graph.node]
    assert {"Pad", "Slice"} <= set(kinds)


@needs_openvino
def test_file_takes_pixels(small: QuantizedNetwork, tmp_path: Path) -> None:
    exported = small.export(tmp_path / "q.openvino.onnx", raw_input=True)
    assert exported.beyond.typical_error < 1e-3


def test_barrier_changes_no_code_in_onnx_runtime(small: QuantizedNetwork, tmp_path: Path) -> None:
    """Weights of 2 bits are INT4: OpenVINO has no INT2."""
    job = replace(TARGETS["onnx"], write=OPENVINO.write)
    exported = small.export(tmp_path / "q.onnx", target=job)
    assert exported.inside.max_difference == exported.beyond.max_difference == 0
    (codes,) = single_pools(tmp_path / "q.onnx")
    assert codes.startswith("conv2d_1.")
    narrow = small.network.with_bits({small.network.weights[0].codes_name: 2})
    quantized = gdfq.QuantizedNetwork(narrow, small.card, examples=small.examples)
    quantized.export(tmp_path / "q.onnx", target=job)
    model = onnx.load(tmp_path / "q.onnx")
    stored = {value.name: value for value in model.graph.initializer}["conv1.weight"]
    assert stored.data_type == onnx.TensorProto.INT4
    assert np.abs(onnx.numpy_helper.to_array(stored).astype(int)).max() <= 2
    assert model.opset_import[0].version == 21
    assert {value.key: value.value for value in model.metadata_props}["onnxruntime"] == ">=1.23"


def test_oldest_versions_depend_on_the_bits(small: QuantizedNetwork) -> None:
    """INT4 came to OpenVINO with 2024.4; files of 6 and 8 bits were loaded in 2023.3."""
    runtime = OPENVINO.runtime
    assert runtime is not None
    assert runtime.oldest_for(small.network) == "2024.4"
    eight = quantized_by_fast(networks.captured("Residual"), "w8a8").network
    assert runtime.oldest_for(eight) == "2023.3"


def test_what_openvino_computes_otherwise_is_refused(
    small: QuantizedNetwork, tmp_path: Path
) -> None:
    """In placement relu the sums are float; resizing with anti-aliasing has other weights."""
    protocol = gdfq.QuantizedNetwork(
        small.network, replace(small.card, placement="relu"), examples=small.examples
    )
    proven = replace(OPENVINO, runtime=None)  # so that the check is reached without OpenVINO
    with pytest.raises(UsageError, match=r"needs placement full; the network's is relu"):
        protocol.export(tmp_path / "q.openvino.onnx", target=proven)

    teacher = capture(Resized(), networks.images(1), classifier=False)
    with pytest.raises(UsageError, match=r"none for: .* \(_upsample_bilinear2d_aa\)"):
        OPENVINO.check_scheme(teacher, Scheme(Bits(8, 8), "full"))


class Pooled(nn.Module):
    """Average pooling between convolutions."""

    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.stem(x).relu())).flatten(1)


def test_average_beyond_the_border_is_refused_before_the_run() -> None:
    """8 + 2 pixels in windows of 3, 2 apart: the fifth window ends one behind the border."""
    scheme = Scheme(Bits(4, 4), "full")
    teacher = capture(Pooled(nn.AvgPool2d(3, 2, 1, ceil_mode=True)), networks.images(1))
    with pytest.raises(UsageError, match=r"none for: avg_pool2d \(avg_pool2d\)"):
        OPENVINO.check_scheme(teacher, scheme)
    for fits in (
        nn.AvgPool2d(3, 2, 1),
        nn.AvgPool2d(3, 2, ceil_mode=True),
        nn.AvgPool2d(2, 2, 1, ceil_mode=True),
        nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
    ):
        OPENVINO.check_scheme(capture(Pooled(fits), networks.images(1)), scheme)


class Enlarged(nn.Module):
    """A transposed convolution between convolutions."""

    def __init__(self, layer: nn.ConvTranspose2d) -> None:
        super().__init__()
        self.stem, self.layer, self.head = nn.Conv2d(3, 4, 1), layer, nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.stem(x).relu())).flatten(1)


WITH_GAPS = nn.ConvTranspose2d(4, 4, (3, 1), (2, 2))
"""Its stride along one axis is larger than its kernel."""


def test_transposed_convolution_with_gaps_is_refused_before_the_run() -> None:
    scheme = Scheme(Bits(8, 8), "full")
    teacher = capture(Enlarged(WITH_GAPS), networks.images(1))
    with pytest.raises(UsageError, match=r"none for: layer \(conv_transpose2d\)"):
        OPENVINO.check_scheme(teacher, scheme)
    for fits in (nn.ConvTranspose2d(4, 4, 2, 2), nn.ConvTranspose2d(4, 4, (3, 1), (2, 1))):
        OPENVINO.check_scheme(capture(Enlarged(fits), networks.images(1)), scheme)


@needs_openvino
def test_transposed_convolution_with_gaps_is_wrong_in_openvino(tmp_path: Path) -> None:
    """The refusal can go once this fails."""
    torch.manual_seed(0)
    quantized = quantized_by_fast(Enlarged(WITH_GAPS).eval(), "w8a8")
    unchecked = replace(OPENVINO, unsupported=lambda graph: [])
    with pytest.raises(GdfqError, match=r"'conv_transpose2d\.q'.*It was not kept"):
        quantized.export(tmp_path / "q.openvino.onnx", target=unchecked)


class Resized(nn.Module):
    """Half of the size, each pixel a weighted mean."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.interpolate(x, size=4, mode="bilinear", antialias=True)
        return self.convolution(x)


def test_missing_openvino_names_the_extra(
    small: QuantizedNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gdfq.deploy.target.find_spec", lambda module: None)
    with pytest.raises(UsageError, match=r"OpenVINO must be .*pip install 'gdfq\[openvino\]'"):
        small.export(tmp_path / "q.openvino.onnx")
