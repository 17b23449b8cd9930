"""Files of target `onnx-fp8`: the numbers of floating-point grids in ONNX Runtime."""

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from support import networks
from support.choice import checked
from torch import nn

from gdfq import TARGETS, GdfqError, UsageError
from gdfq.data.preprocessing import Preprocessing
from gdfq.deploy.card import Card
from gdfq.deploy.onnx.codes import stored_codes
from gdfq.deploy.onnx.floats import StoredNumbers
from gdfq.deploy.onnx.sizes import STORED_FLOATS
from gdfq.deploy.parity import compare_codes
from gdfq.deploy.runtimes import onnx_runner, onnx_values
from gdfq.deploy.target import Job
from gdfq.functional.float_grid import dequantize_float, magnitudes
from gdfq.functional.grid import Bits
from gdfq.graph.capture import Captured, capture
from gdfq.graph.ends import NO_ENDS, output_names
from gdfq.plan.resolve import resolve
from gdfq.quantizers.family import LSQ
from gdfq.sources.base import Batch
from gdfq.student.build import build_student
from gdfq.student.freeze import freeze
from gdfq.student.scheme import Scheme
from gdfq.tuning.calibrate import calibrate_

TARGET = TARGETS["onnx-fp8"]


def job_of(teacher: Captured, bits: str, tmp_path: Path) -> Job:
    """The export of a calibrated network."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(8, *teacher.input_shape, generator=draw)
    scheme = Scheme(Bits.parse(bits), "full", grids=TARGET.grids)
    student = build_student(teacher, scheme, quantizers=LSQ)
    calibrate_(student, [Batch((x,), None, None)], steps=1)
    channels = teacher.input_shape[0]
    preprocessing = Preprocessing.of(channels, (0.0,) * channels, (1.0,) * channels)
    card = Card(
        teacher.inputs, teacher.classes, teacher.outputs, preprocessing, scheme.bits, "full", "", 0
    )
    names = tuple(output_names(card, NO_ENDS))
    return Job(freeze(student), card, tmp_path / "q.fp8.onnx", (x,), outputs=names)


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        *(("Branches", bits) for bits in ("wfp4afp8", "wfp4a8")),
        *(checked(("Branches", bits)) for bits in ("wfp8afp8", "w4afp8")),
        *(checked(("Transposed", bits)) for bits in ("wfp4afp8", "wfp4a8")),
        ("Residual", "wfp8afp8"),
        checked(("Transformer", "wfp4afp8")),
    ],
)
def test_file_has_every_number_of_the_student(name: str, bits: str, tmp_path: Path) -> None:
    job = job_of(networks.captured(name), bits, tmp_path)
    data = TARGET.write(job)
    job.path.write_bytes(data)
    proof = TARGET.prove(job, job.path)
    assert proof.inside.relative_error < 1e-3
    integers = stored_codes(job.network)
    stored = {
        grid.name: integers[grid.name] if grid.form is None else StoredNumbers(f"{grid.name}.dq")
        for grid in job.network.activations
    }
    found = onnx_values(data, [*(s.name for s in stored.values()), *job.outputs], job.examples)
    parities, outputs = compare_codes(job.network, job.examples, found, stored)
    assert len(parities) == len(stored)
    # From equal inputs a number differs only where another order of sums moves it over a middle.
    assert max(parity.differ for parity in parities) < 0.005
    for name, output in zip(job.outputs, outputs, strict=True):
        torch.testing.assert_close(torch.from_numpy(found[name]), output, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", ["wfp8afp8", "wfp4afp8"])
def test_weights_are_floats_of_8_bits_with_the_numbers_of_the_codes(
    bits: str, tmp_path: Path
) -> None:
    job = job_of(networks.captured("Residual"), bits, tmp_path)
    model = onnx.load_from_string(TARGET.write(job))
    constants = {value.name: onnx.numpy_helper.to_array(value) for value in model.graph.initializer}
    for weight in job.network.weights:
        numbers = constants[f"{weight.name}.weight"]
        assert numbers.dtype in {np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2)}
        assert weight.form is not None
        ones = torch.ones_like(weight.scale)
        expected = dequantize_float(weight.codes, ones, weight.form.name).numpy()
        assert np.array_equal(numbers.astype(np.float32), expected)


def test_stored_floats_hold_all_numbers_of_their_formats() -> None:
    for form, held in STORED_FLOATS.items():
        table = magnitudes(form).numpy()
        assert np.array_equal(table.astype(held).astype(np.float32), table), form


class Biased(nn.Module):
    """A ReLU in front of a rounded tensor, and biases far finer than the products' scale."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x).relu().mean((2, 3))
        y: torch.Tensor = self.fc(x)
        return y


def test_neither_a_relu_nor_a_bias_is_lost_in_an_optimised_session(tmp_path: Path) -> None:
    """ONNX Runtime removes a Relu before a QuantizeLinear, and rounds biases to the products."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Biased().eval()
    job = job_of(capture(network, torch.zeros(2, 3, 8, 8)), "wfp4afp8", tmp_path)
    data = TARGET.write(job)
    optimised, plain = (
        onnx_runner(data, as_written=flag)(*job.examples)[0] for flag in (False, True)
    )
    torch.testing.assert_close(optimised, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(optimised, job.network(*job.examples), rtol=1e-5, atol=1e-5)


def test_file_with_another_number_is_refused(tmp_path: Path) -> None:
    job = job_of(networks.captured("Residual"), "wfp8afp8", tmp_path)
    model = onnx.load_from_string(TARGET.write(job))
    scale = next(v for v in model.graph.initializer if v.name.endswith("weight_scale"))
    values = onnx.numpy_helper.to_array(scale) * np.float32(1.3)
    scale.CopyFrom(onnx.numpy_helper.from_array(values, scale.name))
    job.path.write_bytes(model.SerializeToString())
    with pytest.raises(GdfqError, match="must give the student's outputs"):
        TARGET.prove(job, job.path)


def test_activations_of_4_bits_are_refused_before_a_run() -> None:
    with pytest.raises(UsageError, match="a floating-point grid of 4 bits"):
        resolve(networks.captured("Residual"), None, "wfp4afp4", target="onnx-fp8")
