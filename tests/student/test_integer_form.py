"""The integer form of frozen students: exact sums, one rounding, equal to ONNX Runtime's codes."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import gdfq
from gdfq.functional import integer
from gdfq.functional.grid import code_bounds
from gdfq.student.integer_form import SCALE
from gdfq.student.integer_network import scale_of


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


def test_bias_beyond_24_bits_is_rounded_once() -> None:
    sums, bias = torch.tensor([[2.0**24 - 1]]), torch.tensor([2**24 + 2], dtype=torch.int32)
    found = integer.with_bias(sums, bias, -1, exact=False)
    assert found.equal(torch.tensor([[2**25 + 1]], dtype=torch.int32).float())


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


@pytest.mark.parametrize("bits", ["w8a8", "w4a8", "w4a4", "w2a3"])
def test_file_equals_the_network_to_the_bit(residual: nn.Module, bits: str, tmp_path: Path) -> None:
    quantized = gdfq.quantize(residual, torch.zeros(1, 3, 12, 12), bits, "quick", steps=8)
    quantized.export(tmp_path / "s.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "s.onnx", providers=["CPUExecutionProvider"])
    x = torch.randn(64, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    same = np.isclose(found, quantized(x).numpy(), rtol=1e-5, atol=1e-6).all(1)
    assert same.mean() == 1


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
