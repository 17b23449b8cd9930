"""Calls of a `.pte` file in ExecuTorch that are timed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gdfq.deploy.calls import Call, Shapes, noise
from gdfq.errors import UsageError, first_line

MAX_BATCH = 32
"""Most entries of a batch: a file has memory for them."""
_FLOAT = 6
"""ExecuTorch's number for float32."""


def loaded_method(file: Path) -> Any:
    """Return the network of a file, which runs on a list of tensors.

    Raises:
        UsageError: ExecuTorch cannot load the file.
    """
    from executorch.runtime import Runtime

    try:
        return Runtime.get().load_program(file).load_method("forward")
    except RuntimeError as error:
        raise UsageError(
            f"the file must be one that ExecuTorch can load; it says: {first_line(error)}. "
            "Export it again."
        ) from error


def executorch_calls(file: Path, threads: int) -> Callable[[Shapes], Call]:
    """Load a file to be timed (see `gdfq.deploy.calls.Load`)."""
    from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool

    _unsafe_reset_threadpool(threads)
    method = loaded_method(file)

    def prepare(shapes: Shapes) -> Call:
        if any(shape[0] > MAX_BATCH for shape in shapes):
            raise UsageError(
                f"a .pte file takes up to {MAX_BATCH} images at once; got {shapes[0][0]}. Measure "
                "smaller batches."
            )
        kinds = [method.metadata.input_tensor_meta(i).dtype() for i in range(len(shapes))]
        inputs = [
            torch.from_numpy(noise(shape, "float32" if kind == _FLOAT else "int64"))
            for shape, kind in zip(shapes, kinds, strict=True)
        ]
        return lambda: method.execute(inputs)

    return prepare
