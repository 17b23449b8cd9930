"""Calls of an ONNX file in OpenVINO that are timed; without PyTorch."""

from collections.abc import Callable
from pathlib import Path

from gdfq.deploy.calls import Call, Shapes, noise
from gdfq.errors import UsageError, first_line

FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32"}
"""Property of a compiled model. By default OpenVINO rounds floats to 16 bits on processors that
compute with them."""


def openvino_calls(file: Path, threads: int) -> Callable[[Shapes], Call]:
    """Compile a file to be timed (see `gdfq.deploy.calls.Load`)."""
    import openvino

    core = openvino.Core()
    options = {**FLOAT32, "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    try:
        compiled = core.compile_model(core.read_model(file), "CPU", options)
    except RuntimeError as error:
        raise UsageError(
            f"the file must be one that OpenVINO can load; it says: {first_line(error)}. "
            "Export it again."
        ) from error

    def prepare(shapes: Shapes) -> Call:
        inputs = [
            noise(shape, value.get_element_type().to_dtype())
            for value, shape in zip(compiled.inputs, shapes, strict=True)
        ]
        return lambda: compiled(inputs)

    return prepare
