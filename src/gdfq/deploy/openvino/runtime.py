"""OpenVINO, which runs ONNX files on the CPU."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gdfq.deploy.openvino.calls import FLOAT32
from gdfq.deploy.runtimes import Run, with_outputs
from gdfq.errors import UsageError, first_line


def openvino_runner(data: bytes) -> Run:
    """Return a function that runs an ONNX file in OpenVINO.

    Raises:
        UsageError: OpenVINO cannot read the file.
    """
    compiled = _compiled(data)

    def run(*inputs: Tensor) -> list[Tensor]:
        found = compiled([tensor.contiguous().numpy() for tensor in inputs])
        return [torch.from_numpy(np.array(found[output])) for output in compiled.outputs]

    return run


def openvino_values(
    data: bytes, names: Sequence[str], inputs: Sequence[Tensor]
) -> Mapping[str, np.ndarray[Any, Any]]:
    """Return named values of an ONNX file for some inputs, computed by OpenVINO.

    Args:
        data: Contents of the file.
        names: Names of values inside it, or of outputs.
        inputs: A tensor [N, *shape] for each input of the network, in order.

    Raises:
        GdfqError: The file lacks a name.
        UsageError: OpenVINO cannot read the file.
    """
    compiled = _compiled(with_outputs(data, names))
    found = compiled([tensor.contiguous().numpy() for tensor in inputs])
    return {name: np.array(found[compiled.output(name)]) for name in names}


def _compiled(data: bytes) -> Any:
    import openvino

    core = openvino.Core()
    try:
        return core.compile_model(core.read_model(io.BytesIO(data)), "CPU", FLOAT32)
    except RuntimeError as error:
        raise UsageError(
            "OpenVINO must be able to read each operator of the network; it says: "
            f"{_reason(error)}. Choose another target: gdfq targets."
        ) from error


def _reason(error: RuntimeError) -> str:
    """Return the line of a report that says why; places in OpenVINO's sources come before it."""
    lines = [line for line in str(error).splitlines() if line and "Exception from" not in line]
    return next((line for line in lines if "nsupported" in line), [*lines, first_line(error)][0])
