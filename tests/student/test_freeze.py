"""The frozen student computes what the student does."""

import pytest
import torch
from support import networks
from support.narrowing import instance
from support.small_runs import calibrated
from torch import Tensor, nn

from gdfq.errors import GdfqError
from gdfq.functional.grid import Bits, dequantize
from gdfq.graph.capture import Captured
from gdfq.quantizers.base import QuantizedTensor
from gdfq.student.build import build_student
from gdfq.student.freeze import freeze, rescaled
from gdfq.student.scheme import Placement, Scheme


@pytest.mark.parametrize("placement", ["relu", "full"])
def test_frozen_student_equals_the_student_and_is_close_at_eight_bits(
    any_network: nn.Module, any_teacher: Captured, placement: Placement
) -> None:
    student = calibrated(any_teacher, "w8a8", placement)
    x = networks.images(64)
    expected, actual = any_network(x).detach(), student(x).detach()
    assert float((actual - expected).norm() / expected.norm()) < 0.05
    # Folding changes float rounding alone, which may move an activation by a step now and then.
    frozen = freeze(student)(x)
    assert float((frozen - actual).norm() / actual.norm()) < 0.01


@pytest.mark.parametrize("bits", ["w2a2", "w3a5", "w4a4"])
def test_frozen_weights_are_those_of_the_student(any_teacher: Captured, bits: str) -> None:
    student = calibrated(any_teacher, bits, "relu")
    # With activations exact, folding must agree to float rounding.
    for quantizer in student.activations:
        quantizer.bits = 8
        instance(quantizer.scale, Tensor).fill_(1e-7)  # so fine that biases, too, are exact
        quantizer.forward = lambda x: x  # type: ignore[method-assign]
    frozen = freeze(student)
    x = networks.images(16)
    assert torch.allclose(frozen.as_float()(x), student(x), rtol=1e-3, atol=1e-4)
    low, high = -(2 ** (int(bits[1]) - 1)), 2 ** (int(bits[1]) - 1) - 1
    codes = [t for n, t in frozen.named_buffers() if n.endswith("codes")]
    assert codes
    for tensor in codes:
        assert tensor.dtype == torch.int8
        assert low <= int(tensor.min()) <= int(tensor.max()) <= high


def test_rescaling_keeps_codes_exact() -> None:
    codes = torch.tensor([[-8, 0, 7], [-8, 0, 7], [-8, 0, 7]], dtype=torch.int8)
    column = torch.tensor([[0.5], [0.5], [0.5]])
    tensor = QuantizedTensor(codes, column, torch.tensor([[-3.0], [-3.0], [2.0]]), 4)
    factor = torch.tensor([[2.0], [-2.0], [0.0]])
    new = rescaled(tensor, factor)
    values = dequantize(codes, tensor.scale, tensor.zero_point, 4) * factor
    assert torch.equal(dequantize(new.codes, new.scale, new.zero_point, 4), values)
    assert new.codes[1].tolist() == [7, -1, -8]
    assert (new.scale > 0).all()


def test_shared_convolution_gets_a_fold_for_each_norm() -> None:
    frozen = freeze(calibrated(networks.captured("Shared"), "w4a4", "relu"))
    names = [name for name, _ in frozen.named_buffers() if name.endswith(".codes")]
    assert len(names) == 4  # stem, conv twice, fc


def test_freeze_refuses_an_uncalibrated_student(teacher: Captured) -> None:
    with pytest.raises(GdfqError, match="Calibrate"):
        freeze(build_student(teacher, Scheme(Bits(4, 4), "relu")))


def test_bare_matrices_are_quantized_as_linear_layers() -> None:
    frozen = freeze(calibrated(networks.captured("Awkward"), "w2a8", "relu"))
    codes = [name for name, _ in frozen.named_buffers() if name.endswith("codes")]
    assert len(codes) == 4  # convolution, product, linear with the same matrix, fc
