"""Calls of a `.tflite` file that are timed; without PyTorch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from gdfq.deploy.calls import Call, Shapes, noise
from gdfq.errors import UsageError, first_line


def litert_calls(file: Path, threads: int) -> Callable[[Shapes], Call]:
    """Load a file in LiteRT with XNNPACK to be timed (see `gdfq.deploy.calls.Load`)."""
    from ai_edge_litert.interpreter import Interpreter

    try:
        interpreter = Interpreter(model_content=file.read_bytes(), num_threads=threads)
    except (RuntimeError, ValueError) as error:
        raise _refusal(error) from error

    def prepare(shapes: Shapes) -> Call:
        details = interpreter.get_input_details()
        indices = [detail["index"] for detail in details]
        inputs = [
            noise((shape[0], *detail["shape"][1:]), detail["dtype"])
            for detail, shape in zip(details, shapes, strict=True)
        ]
        try:
            for index, array in zip(indices, inputs, strict=True):
                interpreter.resize_tensor_input(index, array.shape)
            interpreter.allocate_tensors()
        except (RuntimeError, ValueError) as error:
            raise _refusal(error) from error
        outputs = [detail["index"] for detail in interpreter.get_output_details()]

        def call() -> list[Any]:
            for index, array in zip(indices, inputs, strict=True):
                interpreter.set_tensor(index, array)
            interpreter.invoke()
            return [interpreter.get_tensor(index) for index in outputs]

        return call

    return prepare


def _refusal(error: Exception) -> UsageError:
    return UsageError(
        "the file must be one that LiteRT can load and run; it says: "
        f"{first_line(error)}. Export it again."
    )
