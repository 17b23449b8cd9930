"""Running exported files where they will run: ONNX Runtime, and torch alone for .pt2."""

import io
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gdfq.errors import UsageError, first_line
from gdfq.outputs import in_order

Run = Callable[[Tensor], list[Tensor]]
"""Images [N, *input_shape] -> the network's outputs in order, all on the CPU."""


def onnx_session(data: bytes, threads: int = 0) -> Any:
    """A session of ONNX Runtime on the CPU; 0 threads are as many as it finds cores.

    Raises UsageError for a file that it cannot load.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors alone
    try:
        return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except _refusals() as error:
        raise UsageError(
            "the file must be an ONNX model that ONNX Runtime can load; it says: "
            f"{first_line(error)}. Export it again."
        ) from error


def _refusals() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises for a file that it cannot load; the types have no public name."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    names = ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NotImplemented")
    return tuple(getattr(state, name) for name in names)


def onnx_runner(data: bytes) -> Run:
    """An ONNX file's contents, ready to run."""
    session = onnx_session(data)
    name = session.get_inputs()[0].name

    def run(images: Tensor) -> list[Tensor]:
        return list(map(torch.from_numpy, session.run(None, {name: images.contiguous().numpy()})))

    return run


def onnx_values(
    data: bytes, names: Sequence[str], images: Tensor
) -> dict[str, np.ndarray[Any, Any]]:
    """What the named values of an ONNX file are for some images."""
    import onnx

    model = onnx.load_from_string(data)
    present = {name for node in model.graph.node for name in node.output}
    wanted = [name for name in names if name in present]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
    session = onnx_session(model.SerializeToString())
    feed = {session.get_inputs()[0].name: images.contiguous().numpy()}
    return dict(zip(wanted, session.run(wanted, feed), strict=True))


def program_runner(data: bytes) -> Run:
    """A .pt2 file's contents, ready to run; only for files that this process has written."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = torch.export.load(io.BytesIO(data)).module(check_guards=False)

    def run(images: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return in_order(module(images))

    return run
