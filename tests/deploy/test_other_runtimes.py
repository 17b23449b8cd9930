"""ONNX files in older versions of ONNX Runtime, in tract and TVM, each in its own process."""

from pathlib import Path

import pytest
import torch
from support import networks
from support.other_runtimes import first_output
from support.small_runs import quantized_by_fast

from gdfq.deploy.onnx.target import ONNX_RUNTIME
from gdfq.quantized import QuantizedNetwork

VERSIONS = ["1.16.3", "1.18.1", "1.20.1", "1.21.1", "1.22.1", "1.23.2", "1.24.4"]


@pytest.fixture(scope="module", params=["w2a8", "w4a4", "w6a8", "w8a8"])
def student(request: pytest.FixtureRequest) -> QuantizedNetwork:
    return quantized_by_fast(networks.captured("Branches"), request.param)


def _inputs(student: QuantizedNetwork) -> torch.Tensor:
    """Usual images, and images three times as large."""
    return torch.cat([student.examples[0], 3 * student.examples[0]])


@pytest.mark.check
@pytest.mark.parametrize("version", VERSIONS)
def test_file_loads_from_its_oldest_version_on(
    version: str, student: QuantizedNetwork, tmp_path: Path
) -> None:
    """Older versions refuse it; no version gives other outputs."""
    student.export(tmp_path / "q.onnx")
    oldest = ONNX_RUNTIME.oldest_for(student.network)
    assert oldest is not None
    found = first_output(f"onnxruntime=={version}", tmp_path / "q.onnx", _inputs(student))
    loads = tuple(map(int, version.split("."))) >= tuple(map(int, oldest.split(".")))
    assert (found is not None) == loads
    assert found is None or found.equal(student(_inputs(student)))


@pytest.mark.check
@pytest.mark.parametrize("version", VERSIONS)
def test_compatible_file_is_equal_in_every_version(
    version: str, student: QuantizedNetwork, tmp_path: Path
) -> None:
    student.export(tmp_path / "q.compat.onnx")
    found = first_output(f"onnxruntime=={version}", tmp_path / "q.compat.onnx", _inputs(student))
    assert found is not None
    assert found.equal(student(_inputs(student)))


@pytest.mark.check
def test_compatible_file_gives_the_same_predictions_in_tract(
    student: QuantizedNetwork, tmp_path: Path
) -> None:
    """tract adds floats, and may round an input at a tie to the other code."""
    student.export(tmp_path / "q.compat.onnx")
    found = first_output("tract==0.23.9", tmp_path / "q.compat.onnx", _inputs(student))
    assert found is not None
    expected = student(_inputs(student))
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02 * float(expected.abs().max()))
    equal = (found - expected).abs().amax(1) < 1e-4
    assert int((~equal).sum()) <= 3


@pytest.mark.check
def test_compatible_file_gives_the_same_outputs_in_tvm(
    student: QuantizedNetwork, tmp_path: Path
) -> None:
    student.export(tmp_path / "q.compat.onnx")
    found = first_output("apache-tvm==0.27.0.post1", tmp_path / "q.compat.onnx", _inputs(student))
    assert found is not None
    expected = student(_inputs(student))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
