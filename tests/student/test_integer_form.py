"""The integer form of frozen students: exact sums, one rounding, equal to ONNX Runtime's codes."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.choice import checked
from torch import Tensor, fx, nn

import gdfq
from gdfq.deploy.onnx.writer import to_onnx
from gdfq.deploy.runtimes import onnx_runner
from gdfq.errors import UsageError
from gdfq.functional import integer
from gdfq.functional.grid import code_bounds
from gdfq.graph import operators
from gdfq.graph.inputs import InputSpec
from gdfq.graph.outputs import in_order
from gdfq.graph.tensors import flat_module
from gdfq.student.integer_form import SCALE
from gdfq.student.integer_network import IntegerNetwork, scale_of
from gdfq.student.ties import scale_off_ties


def test_layer_and_rounding_have_hand_computed_values() -> None:
    u = torch.tensor([[3.0, -2.0]])
    codes, zero_point = torch.tensor([[5, 1]], dtype=torch.int8), torch.tensor([[1.0]])
    linear = torch.ops.aten.linear.default
    sums = integer.products(linear, 1, u, codes, zero_point)  # 3 · 4 − 2 · 0
    assert sums.tolist() == [[12.0]]
    a = integer.with_bias(sums, torch.tensor([7], dtype=torch.int32), -1, exact=True)
    scales = torch.tensor(0.5), torch.tensor([[0.25]])
    assert integer.rescaled(a, *scales, -1).tolist() == [[19 * 0.125]]
    steps = integer.in_steps(a, *scales, -1, torch.tensor(0.25))  # 19 · 0.5 = 9.5
    assert integer.rounded(steps, -8, 7).tolist() == [[7.0]]
    assert integer.rounded(steps, -128, 127).tolist() == [[10.0]]  # half to even


@given(st.integers(1, 12), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_sums_in_parts_equal_those_of_64_bit_integers(inputs: int, outputs: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(-128, 128, (outputs, inputs), generator=draw, dtype=torch.int8)
    zero_point = torch.zeros(outputs, 1)
    u = torch.randint(-(2**16), 2**16, (3, inputs), generator=draw)
    parts = integer.exact_parts(codes, zero_point, 2**16)
    linear = torch.ops.aten.linear.default
    sums = integer.products(linear, parts, u.float(), codes, zero_point)
    assert sums.double().equal((u @ codes.long().T).double())


def test_bias_is_exact_where_float32_holds_each_code() -> None:
    assert integer.is_exact(torch.tensor([2**24, -(2**24), 2**30], dtype=torch.int32))
    assert not integer.is_exact(torch.tensor([3, 2**24 + 1], dtype=torch.int32))


@given(st.integers(-(2**24), 2**24), st.integers(-(2**24), 2**24), st.integers(0, 6))
def test_exact_bias_is_added_as_in_32_bit_integers(total: int, code: int, shift: int) -> None:
    bias = torch.tensor([code << shift], dtype=torch.int32)
    assert integer.is_exact(bias)
    expected = torch.tensor([[total + (code << shift)]], dtype=torch.int32).float()
    sums = torch.tensor([[total]]).float()
    assert integer.with_bias(sums, bias, -1, exact=True).equal(expected)
    assert integer.with_bias(sums, bias, -1, exact=False).equal(expected)


def test_bias_beyond_24_bits_is_rounded_once() -> None:
    sums, bias = torch.tensor([[2.0**24 - 1]]), torch.tensor([2**24 + 2], dtype=torch.int32)
    found = integer.with_bias(sums, bias, -1, exact=False)
    assert found.equal(torch.tensor([[2**25 + 1]], dtype=torch.int32).float())


def test_mean_in_steps_has_hand_computed_values() -> None:
    u = torch.tensor([[[1.0, -3.0], [4.0, 8.0]]])
    scales = torch.tensor(0.5), torch.tensor(0.25)
    assert integer.mean_in_steps(u, [1, 2], True, *scales).tolist() == [[[5.0]]]  # 10 · 2 / 4
    assert integer.mean_in_steps(u, [-1], False, *scales).tolist() == [[-2.0, 12.0]]
    # float32 cannot hold the sum of these.
    many = torch.full((1, 2**17), 255.0)
    many[0, 0] = 254
    exact = torch.tensor(255 * 2**17 - 1).float() * (2 * 2.0**-17)
    assert integer.mean_in_steps(many, [1], False, *scales).item() == exact


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 3, 1, 1), nn.BatchNorm2d(16)
        self.deep = nn.Conv2d(16, 16, 3, 1, 1, groups=4)
        self.last = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.relu6(4 * self.norm(self.first(x)))
        x = torch.relu(x + self.deep(nn.functional.max_pool2d(x, 3, 1, 1)))
        return self.last(x.mean((2, 3)))


@pytest.fixture(scope="module")
def residual() -> nn.Module:
    torch.manual_seed(0)
    network = _Residual().train()
    with torch.no_grad():
        for _ in range(20):
            network(torch.randn(16, 3, 12, 12))
    return network.eval()


@pytest.mark.parametrize("bits", ["w8a8", checked("w4a8"), "w4a4", checked("w2a3")])
def test_file_equals_the_network_to_the_bit(residual: nn.Module, bits: str, tmp_path: Path) -> None:
    quantized = gdfq.quantize(residual, torch.zeros(1, 3, 12, 12), bits, "quick", steps=8)
    quantized.export(tmp_path / "s.onnx")
    x = torch.randn(64, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    (found,) = onnx_runner((tmp_path / "s.onnx").read_bytes(), precise=True)(x)
    assert torch.isclose(found, quantized(x), rtol=1e-5, atol=1e-6).all()


def test_form_rounds_every_activation_once_within_its_bounds(residual: nn.Module) -> None:
    quantized = gdfq.quantize(residual, torch.zeros(1, 3, 12, 12), "w4a4", "quick", steps=8)
    network = quantized.network
    rounded = [node for node in network.integer_form.graph.nodes if SCALE in node.meta]
    grids = {str(scale_of(grid.node).target): grid for grid in network.activations}
    assert [node.meta[SCALE] for node in rounded] == list(grids)
    for node in rounded:
        grid = grids[node.meta[SCALE]]
        bounds = tuple(float(code - grid.zero_point) for code in code_bounds(grid.bits))
        assert node.args[1:] == bounds


def test_form_follows_the_network_to_other_tensors(residual: nn.Module) -> None:
    network = gdfq.quantize(residual, torch.zeros(1, 3, 12, 12), "w8a8", "quick", steps=8).network
    x = torch.randn(2, 3, 12, 12)
    before = network(x)
    weight = network.weights[0]
    with torch.no_grad():
        parent, _, leaf = weight.scale_name.rpartition(".")
        module = network.module.get_submodule(parent)
        setattr(module, leaf, 2 * getattr(module, leaf))
    assert not network(x).equal(before)


def _layer(clamp: tuple[float, float], other_scale: bool = False) -> IntegerNetwork:
    """Return a network of a quantized input, a linear layer, a clamp and a quantizer."""
    tensors = {
        "x.scale": torch.tensor(0.25),
        "x.zero_point": torch.tensor(0.0),
        "y.scale": torch.tensor(0.5),
        "y.zero_point": torch.tensor(0.0),
        "w.codes": torch.tensor([[3, -2], [1, 4]], dtype=torch.int8),
        "w.scale": torch.tensor([[0.5], [0.25]]),
        "w.zero_point": torch.tensor([[0.0], [1.0]]),
        "w.bias": torch.tensor([5, -6], dtype=torch.int32),
    }
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = {name: graph.get_attr(name) for name in tensors}

    def call(name: str, *arguments: Any) -> fx.Node:
        return graph.call_function(operators.resolve(name), arguments)

    u = call(operators.FAKE_QUANTIZE, x, node["x.scale"], node["x.zero_point"], 4)
    weight = [node[f"w.{part}"] for part in ("codes", "scale", "zero_point")]
    scale = node["y.scale" if other_scale else "x.scale"]
    bias = call(operators.DEQUANTIZE_BIAS, node["w.bias"], scale, weight[1])
    y = call(operators.LINEAR, u, call(operators.DEQUANTIZE, *weight, 4), bias)
    y = call("aten.clamp.default", y, *clamp)
    graph.output(call(operators.FAKE_QUANTIZE, y, node["y.scale"], node["y.zero_point"], 4))
    return IntegerNetwork(flat_module(graph, tensors))


def _functions(network: IntegerNetwork) -> list[Any]:
    return [node.target for node in network.integer_form.graph.nodes]


@pytest.mark.parametrize("clamp", [(0.6, 6.0), (-9.0, -0.6), (-1.0, 1.0), (-9.0, 9.0)])
def test_clamp_before_a_quantizer_stays_if_it_changes_codes(clamp: tuple[float, float]) -> None:
    network = _layer(clamp)
    x = torch.linspace(-3, 3, 40).reshape(20, 2)
    assert network(x).equal(network.module(x))
    assert (torch.ops.aten.clamp.default in _functions(network)) == (clamp != (-9.0, 9.0))


def test_bias_on_another_grid_keeps_a_layer_float() -> None:
    network = _layer((-9.0, 9.0), other_scale=True)
    x = torch.linspace(-3, 3, 40).reshape(20, 2)
    assert network(x).equal(network.module(x))
    assert integer.products not in _functions(network)


def test_network_ignores_autocast() -> None:
    network = _layer((-9.0, 9.0))
    x = torch.linspace(-3, 3, 40).reshape(20, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert network(x).equal(_layer((-9.0, 9.0))(x))


def test_form_follows_changes_in_place() -> None:
    network, other = _layer((-9.0, 9.0)), _layer((-9.0, 9.0))
    x = torch.linspace(-3, 3, 40).reshape(20, 2)
    network(x)
    for one in (network, other):
        with torch.no_grad():
            one.tensors["y.zero_point"].add_(3)
    assert network(x).equal(other(x))


def test_network_is_copied_and_not_pickled() -> None:
    network = _layer((-9.0, 9.0)).eval()
    x = torch.linspace(-3, 3, 40).reshape(20, 2)
    before = network(x)
    copied = copy.deepcopy(network)
    with torch.no_grad():
        network.tensors["w.scale"].mul_(3)
    assert copied(x).equal(before)
    assert not network(x).equal(before)
    assert not copied.training
    with pytest.raises(UsageError, match="saved as data, not pickled"):
        pickle.dumps(network)


def test_sums_that_no_split_makes_exact_are_added_in_float64() -> None:
    codes = torch.full((2, 1, 1024), 127, dtype=torch.int8)
    codes[:, :, ::2] = 126
    zero_point = torch.zeros(2, 1, 1)
    assert integer.exact_parts(codes, zero_point, 255) == 0
    u = torch.full((1, 1, 1024), 255.0)
    conv = torch.ops.aten.conv1d.default
    sums = integer.products(conv, 0, u, codes, zero_point)
    assert sums.flatten().tolist() == [255 * 512 * (126 + 127)] * 2
    # Groups are not split: with two inputs of a group each could be exact alone.
    codes = torch.full((2, 2, 400), 127, dtype=torch.int8)
    assert integer.exact_parts(codes, zero_point, 255) == 2
    assert integer.exact_parts(codes, zero_point, 255, groups=2) == 0


def test_input_in_half_precision_is_added_in_float32() -> None:
    codes = torch.full((1, 600), 7, dtype=torch.int8)
    u = torch.full((1, 600), 15.0).half()
    linear = torch.ops.aten.linear.default
    sums = integer.products(linear, 1, u, codes, torch.zeros(1, 1).half())
    assert sums.dtype == torch.float32
    assert sums.tolist() == [[63000.0]]


class _Moved(nn.Module):
    """Layers that read moved tensors, without bias, in groups, and in three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(3, 8, 3, padding=1, padding_mode="circular", bias=False)
        self.grouped = nn.Conv1d(8, 8, 3, padding="same", groups=4)
        self.part = nn.Conv1d(4, 4, 1)
        self.rows, self.last = nn.Linear(4, 6), nn.Linear(6, 5)
        self.up = nn.ConvTranspose1d(8, 4, 2, 2, groups=2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = torch.relu(self.grouped(torch.relu(self.first(x))))
        _, b = x.chunk(2, 1)
        rows = torch.relu(self.rows(self.part(b).transpose(1, 2)))
        return self.last(rows), self.up(x), x.flatten(1)


@pytest.mark.parametrize("bits", ["w8a8", "w3a4"])
def test_form_computes_what_the_graph_says(bits: str) -> None:
    torch.manual_seed(0)
    data = torch.randn(32, 3, 16, generator=torch.Generator().manual_seed(0))
    teacher = _Moved().eval()
    network = gdfq.quantize(
        teacher, torch.zeros(1, 3, 16), bits, "quick", steps=4, data=data
    ).network
    functions = _functions(network)
    assert functions.count(integer.products) == 5
    assert torch.ops.aten.conv_transpose1d.default in functions
    expected, actual = in_order(network.module(data)), network.outputs(data)
    for one, other in zip(expected, actual, strict=True):
        near = torch.isclose(one, other, rtol=1e-4, atol=1e-5)
        assert float(near.double().mean()) > 0.98  # rounding may move single codes


def _between_grids(
    operator: tuple[Any, ...], x_scale: Tensor, *y_grids: tuple[Tensor, float]
) -> IntegerNetwork:
    """Return a network of an operator between quantizers of 8 bits, one for each output.

    Args:
        operator: Its name, and what follows the tensor among its arguments.
        x_scale: Scale of its input, whose zero point is -128.
        *y_grids: Scale and zero point of each output.
    """
    grids = [(x_scale, -128.0), *y_grids]
    graph = fx.Graph()
    tensors: dict[str, Tensor] = {}
    x, outputs = graph.placeholder("x"), []
    for i, (scale, zero_point) in enumerate(grids):
        parts = {"scale": scale, "zero_point": torch.tensor(zero_point)}
        tensors |= {f"quantized.{i}.{name}": value for name, value in parts.items()}
        constants = [graph.get_attr(f"quantized.{i}.{name}") for name in parts]
        rounded = graph.call_function(
            operators.resolve(operators.FAKE_QUANTIZE), (x, *constants, 8)
        )
        if i == 0:
            x = graph.call_function(operators.resolve(operator[0]), (rounded, *operator[1:]))
        else:
            outputs.append(rounded)
    graph.output(tuple(outputs) if len(outputs) > 1 else outputs[0])
    return IntegerNetwork(flat_module(graph, tensors))


def _pooled(ratio: int, size: Any) -> IntegerNetwork:
    """Return a network of a mean between two quantizers, whose scales are as `ratio` to 255."""
    scale = torch.tensor(0.037)
    return _between_grids(size, scale, (scale * ratio / 255, -127.0))


@pytest.mark.parametrize(
    "function",
    [
        *((f"aten.{name}.default",) for name in ("celu", "log1p", "selu", "sin")),
        *(("aten.pow.Tensor_Scalar", 3), ("aten.rsub.Scalar", 0.3)),
    ],
)
def test_functions_that_had_results_at_ties_are_rounded_as_in_the_file(function: Any) -> None:
    """The scale of the result would put one code of the input in the middle of two codes."""
    name, *numbers = function
    values = torch.arange(256) * torch.tensor(0.0123)
    results = operators.resolve(name)(values.double(), *numbers)
    ties = [(results[code].abs() / 90.5).float() for code in range(40, 256, 43)]
    zero = torch.tensor(0.0)
    grids = [(scale_off_ties(results, tie, zero, 8), 0.0) for tie in ties]
    network = _between_grids(function, torch.tensor(0.0123), *grids)
    data = to_onnx(network, [InputSpec("x", (256,))], {}, outputs=[f"y{i}" for i in range(6)])
    for expected, actual in zip(
        network(values[None]), onnx_runner(data)(values[None]), strict=True
    ):
        assert expected.equal(actual)


@pytest.mark.parametrize(
    ("shape", "mean"),
    [
        ((1, 2, 2), ("aten.adaptive_avg_pool2d.default", [1, 1])),
        ((1, 2, 2), ("aten.mean.dim", [2, 3], True)),
        checked(((1, 2, 2), ("aten.mean.dim", [-1, -2]))),
        checked(((1, 4), ("aten.adaptive_avg_pool1d.default", [1]))),
        checked(((1, 2, 2, 1), ("aten.adaptive_avg_pool3d.default", [1, 1, 1]))),
    ],
)
def test_means_at_ties_are_rounded_as_in_the_file(shape: tuple[int, ...], mean: Any) -> None:
    """The range of a mean is often a code of its input, whose scale is then a ratio to its own."""
    codes = torch.randint(0, 256, (4096, *shape), generator=torch.Generator().manual_seed(0))
    x = codes * torch.tensor(0.037)
    for ratio in range(110, 256, 24):
        network = _pooled(ratio, mean)
        data = to_onnx(network, [InputSpec("x", shape)], {}, outputs=["y"])
        assert network(x).equal(onnx_runner(data)(x)[0])


class _Excited(nn.Module):
    """Squeeze-and-excitation blocks: each kind of mean and gate, with and without a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1), nn.BatchNorm2d(32))
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(32, 32, 3, 1, 1, groups=8), nn.BatchNorm2d(32))
            for _ in range(4)
        )
        self.inner = nn.ModuleList(nn.Conv2d(32, 8, 1) for _ in range(4))
        self.outer = nn.ModuleList(nn.Conv2d(8, 32, 1) for _ in range(4))
        self.last = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        for i, layer in enumerate(self.layers):
            y = torch.relu(layer(x))
            pooled = nn.functional.adaptive_avg_pool2d(y, 1) if i < 2 else y.mean((2, 3), True)
            gate = self.outer[i](torch.relu(self.inner[i](pooled)))
            y = y * (torch.sigmoid(gate) if i % 2 else nn.functional.hardsigmoid(gate))
            x = torch.relu(x + y) if i else y
        return self.last(x.mean((2, 3)))


@pytest.mark.parametrize("bits", [checked("w8a8"), "w4a8", checked("w4a4")])
def test_file_of_squeeze_and_excitation_equals_the_network(bits: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = _Excited().train()
    with torch.no_grad():
        for _ in range(10):
            network(torch.randn(32, 3, 4, 4))
    data = torch.randn(64, 3, 4, 4)
    quantized = gdfq.quantize(network.eval(), data[:1], bits, "quick", steps=4, data=data)
    exported = quantized.export(tmp_path / "s.onnx")
    assert exported.differs_first == ()
    x = torch.randn(1024, 3, 4, 4)
    (found,) = onnx_runner((tmp_path / "s.onnx").read_bytes(), precise=True)(x)
    same = torch.isclose(found, quantized(x), rtol=1e-5, atol=1e-6).all(1)
    assert same.all()
