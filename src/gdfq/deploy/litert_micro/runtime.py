"""TFLite Micro's interpreter on the CPU, with its reference kernels."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from gdfq.deploy.litert.flatbuffer import schema, with_outputs
from gdfq.errors import UsageError, first_line

_ARENA_BYTES = 2**20
"""Memory for the interpreter's own structures; that for tensors is estimated."""


def micro_values(
    data: bytes, inputs: Sequence[Sequence[np.ndarray[Any, Any]]]
) -> dict[str, np.ndarray[Any, Any]]:
    """Return all tensors that operators write, for some inputs.

    Args:
        data: Contents of a file for one input at a time.
        inputs: For each input, codes [1, ...] in the file's order of dimensions, once for each
            call.

    Returns:
        The tensors of all calls joined, by name.

    Raises:
        UsageError: TFLite Micro is not installed, or cannot run the file.
    """
    names = _written(data)
    interpreter = _loaded(with_outputs(data, names))
    found: dict[str, list[np.ndarray[Any, Any]]] = {name: [] for name in names}
    for arrays in zip(*inputs, strict=True):
        try:
            for index, array in enumerate(arrays):
                interpreter.set_input(np.ascontiguousarray(array), index)
            interpreter.invoke()
        except (RuntimeError, ValueError) as error:
            raise _refusal(error) from error
        for index, name in enumerate(names):
            found[name].append(np.array(interpreter.get_output(index)))
    return {name: np.concatenate(arrays) for name, arrays in found.items()}


def _written(data: bytes) -> list[str]:
    """Return the names of the tensors that operators write, outputs first and in order."""
    (graph,) = schema().ModelT.InitFromPackedBuf(data).subgraphs
    outputs = list(map(int, graph.outputs))
    inner = [int(index) for operator in graph.operators for index in operator.outputs]
    indices = [*outputs, *(index for index in inner if index not in outputs)]
    return [graph.tensors[index].name.decode() for index in indices]


def _loaded(data: bytes) -> Any:
    try:
        from tflite_micro.python.tflite_micro import runtime
    except ImportError as error:
        raise UsageError(
            "a file for TFLite Micro is compared in its interpreter, which is not installed. "
            "Install gdfq[litert-micro], or tflite-micro."
        ) from error
    (graph,) = schema().ModelT.InitFromPackedBuf(data).subgraphs
    sizes = [int(np.prod(tensor.shape)) for tensor in graph.tensors]
    arena = _ARENA_BYTES + 4 * sum(sizes) + 2048 * len(graph.operators)
    try:
        return runtime.Interpreter.from_bytes(data, arena_size=arena)
    except (RuntimeError, ValueError) as error:
        raise _refusal(error) from error


def _refusal(error: Exception) -> UsageError:
    return UsageError(
        "TFLite Micro must be able to run each operator of the file; it says: "
        f"{first_line(error)}. Choose another target: gdfq targets."
    )
