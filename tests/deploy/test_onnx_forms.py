"""Variants of the ONNX file: weights folded to INT8, and old opsets."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from support import networks
from support.choice import checked, every_second
from support.operator_calls import CALLS, call
from support.small_runs import quantized_by_fast
from torch import Tensor, nn

import gdfq
from gdfq import UsageError
from gdfq.deploy.onnx import exporter
from gdfq.deploy.onnx.equivalents import with_equivalents
from gdfq.deploy.onnx.lowering import lower
from gdfq.deploy.onnx.session import onnx_session
from gdfq.deploy.runtimes import computed_in_float
from gdfq.graph import operators
from gdfq.graph.capture import capture
from gdfq.graph.tensors import flat_module, tensors_of
from gdfq.quantized import QuantizedNetwork
from gdfq.recipes import Recipe
from gdfq.student.scheme import Placement


def constants(path: Path) -> dict[str, np.ndarray]:
    graph = onnx.load(path).graph
    return {value.name: onnx.numpy_helper.to_array(value) for value in graph.initializer}


@pytest.mark.parametrize("weights", every_second(range(2, 9)))
def test_folded_weights_are_codes_minus_zero_points(weights: int, tmp_path: Path) -> None:
    quantized = quantized_by_fast(networks.captured("Branches"), f"w{weights}a{10 - weights}")
    exported = quantized.export(tmp_path / "q.compat.onnx")
    assert exported.target == "onnx-compat"
    assert "needs ONNX Runtime 1.16 or newer" in exported.notes
    assert exported.inside.max_difference == exported.beyond.max_difference == 0
    model = onnx.load(tmp_path / "q.compat.onnx")
    assert (model.opset_import[0].version, model.ir_version) == (13, 7)
    assert not {"Cast", "Sub"} & {node.op_type for node in model.graph.node}
    stored = constants(tmp_path / "q.compat.onnx")
    assert quantized.network.weights
    for weight in quantized.network.weights:
        expected = weight.codes.float() - weight.zero_point
        assert stored[f"{weight.name}.weight"].dtype == np.int8
        np.testing.assert_array_equal(stored[f"{weight.name}.weight"], expected.numpy())


@pytest.mark.parametrize("placement", ["full", checked("relu")])
@pytest.mark.parametrize("name", every_second(networks.NETWORKS))
def test_compatible_file_matches_the_student_for_every_network(
    name: str, placement: Placement, tiny: Recipe, tmp_path: Path
) -> None:
    """It runs in integer kernels where the default file does."""
    teacher, image = networks.captured(name), networks.images(1)
    quantized = gdfq.quantize(teacher, image, "w4a4", tiny, placement=placement)
    exported = quantized.export(tmp_path / "q.compat.onnx")
    assert exported.inside.typical_error < 1e-3
    assert exported.beyond.typical_error < 1e-3
    quantized.export(tmp_path / "q.onnx")
    floats, usual = (
        computed_in_float((tmp_path / name).read_bytes()) for name in ("q.compat.onnx", "q.onnx")
    )
    assert [kind for _, kind in floats if kind in {"Conv", "Gemm", "MatMul", "FusedConv"}] == [
        kind for _, kind in usual if kind in {"Conv", "Gemm", "MatMul", "FusedConv"}
    ]
    model = onnx.load(tmp_path / "q.compat.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert model.opset_import[0].version == 13


def test_compatible_file_takes_pixels(small: QuantizedNetwork, tmp_path: Path) -> None:
    exported = small.export(tmp_path / "q.compat.onnx", raw_input=True)
    assert exported.inside.max_difference < 1e-5
    model = onnx.load(tmp_path / "q.compat.onnx")
    assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    facts = {entry.key: entry.value for entry in model.metadata_props}
    assert facts["onnxruntime"] == ">=1.16"


class Of(nn.Module):
    """Functions of one tensor, each of whose results is an output."""

    def __init__(self, *functions: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.functions = functions

    def forward(self, x: Tensor) -> list[Tensor]:
        return [function(x) for function in self.functions]


def lowered(*functions: Callable[[Tensor], Tensor]) -> ir.Model:
    """Functions of a tensor [N, 4, 6, 6] in the lowest opset."""
    teacher = capture(Of(*functions), torch.randn(1, 4, 6, 6), classifier=False)
    graph = with_equivalents(teacher.network.graph)
    model = exporter.exported(flat_module(graph, tensors_of(teacher.network)), teacher.inputs)
    model.graph.inputs[0].name = "x"
    lower(model)
    return model


NEWER = {
    "aten.tril.default": 14,
    "aten.triu.default": 14,
    "aten.grid_sampler.default": 16,
    "aten._upsample_bicubic2d_aa.vec": 18,
    "aten._upsample_bilinear2d_aa.vec": 18,
    "aten.col2im.default": 18,
}
"""Operators that opset 13 does not have, and the first opset that has them."""
_OF_13 = sorted(
    name for name in operators.ALLOWED if name.startswith("aten.") and name not in NEWER
)
_TOGETHER = 16
"""Operators in one file: a file of one operator takes as long."""


def check(opset: int, *functions: Callable[[Tensor], Tensor]) -> None:
    """Compare ONNX Runtime with PyTorch, at another length of the batch than the traced one."""
    model = lowered(*functions)
    assert model.opset_imports[""] == opset
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    x = torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    actual = onnx_session(proto.SerializeToString()).run(None, {"x": x.numpy()})
    for expected, found in zip(Of(*functions)(x), actual, strict=True):
        got = torch.from_numpy(found).to(expected.dtype)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.check
@pytest.mark.parametrize("first", range(0, len(_OF_13), _TOGETHER))
def test_operator_has_an_equal_form_in_opset_13(first: int) -> None:
    check(13, *map(call, _OF_13[first : first + _TOGETHER]))


@pytest.mark.parametrize(("name", "opset"), NEWER.items())
def test_newer_operator_decides_the_opset(name: str, opset: int) -> None:
    """Operators beside it are written for that opset, too."""
    assert name in CALLS
    check(opset, call(name), lambda x: x.mean(1), lambda x: x.chunk(2, 1)[1], lambda x: x.amax(2))


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_is_written_out(approximate: str) -> None:
    check(13, lambda x: torch.nn.functional.gelu(x, approximate=approximate))


def test_uneven_parts_of_a_split_have_sizes() -> None:
    check(13, lambda x: x[:, :, :5].chunk(2, 2)[1], lambda x: x.chunk(4, 2)[2])


def test_norms_of_groups_and_of_several_dimensions_are_written_out() -> None:
    weight = torch.linspace(-1, 1, 36).view(6, 6)
    check(
        13,
        lambda x: torch.nn.functional.layer_norm(x, (6, 6), weight, weight.flip(0), 1e-3),
        lambda x: torch.nn.functional.layer_norm(x, (6,)),
        lambda x: torch.nn.functional.group_norm(x, 2, weight[0, :4], weight[1, :4], 1e-3),
        lambda x: torch.nn.functional.group_norm(x, 4),
    )


def test_circular_padding_needs_opset_19() -> None:
    check(19, lambda x: torch.nn.functional.pad(x, (1, 2, 2, 1), mode="circular"))


def test_operator_newer_than_opset_19_is_refused() -> None:
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, 4]))
    node = ir.node("RMSNormalization", [x, x])  # of opset 23
    graph = ir.Graph([x], list(node.outputs), nodes=[node], opset_imports={"": 23})
    with pytest.raises(UsageError, match=r"RMSNormalization is newer\. Export with --target onnx"):
        lower(ir.Model(graph, ir_version=10))
