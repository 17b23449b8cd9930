"""Runtimes of exported files: ONNX Runtime, and PyTorch for .pt2."""

import io
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gdfq.deploy.onnx.session import loaded, onnx_session, run_once, session_options
from gdfq.errors import GdfqError, first_line
from gdfq.execution.tracing import exclusive_tracing
from gdfq.graph.outputs import in_order

Run = Callable[..., list[Tensor]]
"""One tensor [N, *shape] for each input -> the network's outputs in order, all on the CPU."""


def onnx_runner(data: bytes, *, precise: bool = False, as_written: bool = False) -> Run:
    """Return a function that runs an ONNX file.

    Args:
        data: Contents of the file.
        precise: Whether 8-bit sums must not saturate (see `PRECISE`).
        as_written: Whether each operator is computed as the file has it.

    Raises:
        UsageError: ONNX Runtime cannot load the file.
    """
    session = onnx_session(data, precise=precise, as_written=as_written)

    def run(*inputs: Tensor) -> list[Tensor]:
        return list(map(torch.from_numpy, run_once(session, None, _named_inputs(session, inputs))))

    return run


def onnx_values(
    data: bytes,
    names: Sequence[str],
    inputs: Sequence[Tensor],
    *,
    precise: bool = False,
    as_written: bool = False,
) -> dict[str, np.ndarray[Any, Any]]:
    """Return the named values of an ONNX file for some inputs.

    Args:
        data: Contents of the file.
        names: Names of values inside it, or of outputs.
        inputs: A tensor [N, *shape] for each input of the network, in order.
        precise: Whether 8-bit sums must not saturate (see `PRECISE`).
        as_written: Whether each operator is computed as the file has it.

    Raises:
        GdfqError: The file lacks a name.
    """
    session = onnx_session(with_outputs(data, names), precise=precise, as_written=as_written)
    found = run_once(session, names, _named_inputs(session, inputs))
    return dict(zip(names, found, strict=True))


def with_outputs(data: bytes, names: Sequence[str]) -> bytes:
    """Return an ONNX file whose named values are outputs, too.

    Raises:
        GdfqError: The file lacks a name.
    """
    import onnx

    model = onnx.load_from_string(data)
    present = {name for node in model.graph.node for name in node.output}
    if missing := [name for name in names if name not in present]:
        raise GdfqError(
            "an exported file must hold each activation's codes under their name, to compare them; "
            f"it has no {', '.join(map(repr, missing))}. Report the network."
        )
    outputs = {value.name for value in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names if n not in outputs)
    return bytes(model.SerializeToString())


def _named_inputs(session: Any, inputs: Sequence[Tensor]) -> dict[str, np.ndarray[Any, Any]]:
    """Return inputs by the names of a session's inputs, in order."""
    names = [value.name for value in session.get_inputs()]
    return {name: tensor.contiguous().numpy() for name, tensor in zip(names, inputs, strict=True)}


_MAKE_INTEGERS = frozenset(
    {"QuantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "QLinearConv", "QLinearMatMul"}
    | {"Shape"}
)
_MAKE_FLOATS = frozenset({"Cast", "DequantizeLinear", "QGemm"})
_NO_SUMS = _MAKE_INTEGERS | {
    *(
        "Cast",
        "Clip",
        "DequantizeLinear",
        "Expand",
        "Flatten",
        "Gather",
        "Identity",
        "Pad",
        "Reshape",
    ),
    *("Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"),
}
"""Operators that convert between integers and floats, or only move or clip values."""


def computed_in_float(data: bytes) -> list[tuple[str, str]]:
    """Return names and types of the operators that ONNX Runtime computes in float, in order.

    They are the operators after its graph optimization.
    """
    import onnx
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        options, path = session_options(), Path(folder) / "optimized.onnx"
        options.optimized_model_filepath = str(path)
        # Higher levels change the memory layout for this processor.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        loaded(data, options)
        graph = onnx.load(path).graph
    before = onnx.load_from_string(data).graph.node
    by_weight = {node.input[1]: node.name for node in before if len(node.input) > 1}
    integers: set[str] = set()
    found = []
    for node in graph.node:
        numbers = node.input[:1] if node.op_type in _NO_SUMS else node.input
        from_integers = not integers.isdisjoint(numbers)
        if node.op_type in _MAKE_INTEGERS or (from_integers and node.op_type not in _MAKE_FLOATS):
            integers.update(node.output)
        elif node.op_type not in _NO_SUMS and not from_integers:
            # Fusing may lose a layer's name.
            weight = node.input[1] if len(node.input) > 1 else ""
            found.append((node.name or by_weight.get(weight, ""), node.op_type))
    return found


def program_runner(data: bytes) -> Run:
    """Return a function that runs a .pt2 file, which this process must have written.

    Raises:
        GdfqError: PyTorch cannot load the file.
    """
    try:
        with exclusive_tracing():
            module = torch.export.load(io.BytesIO(data)).module(check_guards=False)
    except Exception as error:
        raise GdfqError(
            f"torch must be able to load the program that it saved; it says: {first_line(error)}. "
            "Export with --target safetensors instead."
        ) from error

    def run(*inputs: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return in_order(module(*inputs))

    return run
