"""Sessions of ONNX Runtime, and calls that are timed; without PyTorch."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gdfq.deploy.calls import Call, Shapes, noise
from gdfq.errors import UsageError, first_line

PRECISE = ("session.x64quantprecision", "1")
"""Session option that prevents saturation of 8-bit sums on x86 processors without VNNI. ONNX
Runtime then uses slower kernels there; other processors ignore it."""

_PROVIDERS = ["CPUExecutionProvider"]


def onnx_session(
    file: bytes | Path, threads: int = 0, *, precise: bool = False, as_written: bool = False
) -> Any:
    """Return a session of ONNX Runtime on the CPU.

    Args:
        file: Its contents, or its path if it has external weights.
        threads: Number of threads; 0 is the number of cores.
        precise: Whether 8-bit sums must not saturate (see `PRECISE`).
        as_written: Whether each operator is computed as the file has it: nothing is fused.

    Raises:
        UsageError: ONNX Runtime cannot load the file.
    """
    options = session_options()
    if as_written:
        import onnxruntime

        level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.graph_optimization_level = level
    options.intra_op_num_threads = threads
    if precise:
        options.add_session_config_entry(*PRECISE)
    return loaded(file, options)


def session_options() -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised instead
    return options


def loaded(file: bytes | Path, options: Any) -> Any:
    import onnxruntime

    content = str(file) if isinstance(file, Path) else file
    try:
        return onnxruntime.InferenceSession(content, options, providers=_PROVIDERS)
    except _errors() as error:
        raise UsageError(
            "the file must be an ONNX model that ONNX Runtime can load; it says: "
            f"{first_line(error)}. Export it again."
        ) from error


def _errors() -> tuple[type[Exception], ...]:
    """Return the exceptions of ONNX Runtime, whose types have no public name."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    names = (
        *("EPFail", "Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoModel"),
        *("NoSuchFile", "NotImplemented", "RuntimeException"),
    )
    return (RuntimeError, ValueError, *(getattr(state, name) for name in names))


def run_once(session: Any, names: Sequence[str] | None, feed: Mapping[str, object]) -> list[Any]:
    """Return the named outputs of a session, or all.

    Args:
        session: An ONNX Runtime session.
        names: Names of the outputs; None for all in order.
        feed: Arrays by the names of the inputs.

    Raises:
        UsageError: The model does not run.
    """
    try:
        return list(session.run(names, feed))
    except _errors() as error:
        raise UsageError(
            "ONNX Runtime must be able to run the file on these inputs; it says: "
            f"{first_line(error)}. Export it again."
        ) from error


_INPUT_TYPES = {
    "tensor(float)": "float32",
    "tensor(uint8)": "uint8",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(bool)": "bool",
}


def onnx_calls(file: Path, threads: int) -> Callable[[Shapes], Call]:
    """Load an ONNX file to be timed (see `gdfq.deploy.calls.Load`)."""
    session = onnx_session(file, threads)

    def prepare(shapes: Shapes) -> Call:
        feed = _feed(session, shapes)
        return lambda: run_once(session, None, feed)

    return prepare


def _feed(session: Any, shapes: Shapes) -> dict[str, Any]:
    """Return noise for the inputs of a session, by their names.

    Raises:
        UsageError: The session takes other inputs.
    """
    try:
        inputs = [(value.name, value.type, [*value.shape]) for value in session.get_inputs()]
    except UnicodeDecodeError as error:
        raise UsageError(
            "the inputs of an ONNX file must have names in UTF-8; those of one have not. "
            "Export it again."
        ) from error
    if len(inputs) != len(shapes) or not all(map(_takes, inputs, shapes)):
        expected = ", ".join("x".join(map(str, ("N", *shape[1:]))) for shape in shapes)
        found = ", ".join(f"{kind} {sides}" for _, kind, sides in inputs)
        raise UsageError(
            f"files that are compared must take batches {expected} of any size N; one takes "
            f"{found or 'nothing'}. Export it with a dynamic batch dimension and sizes that are "
            "known."
        )
    return {
        name: noise(shape, _INPUT_TYPES[kind])
        for (name, kind, _), shape in zip(inputs, shapes, strict=True)
    }


def _takes(value: tuple[str, str, list[Any]], shape: tuple[int, ...]) -> bool:
    """Return whether an input of a session takes batches of a shape, of any length."""
    _, kind, sides = value
    return (
        kind in _INPUT_TYPES
        and len(sides) == len(shape)
        and not isinstance(sides[0], int)
        and all(
            side == given or (kind == "tensor(int64)" and not isinstance(side, int))
            for side, given in zip(sides[1:], shape[1:], strict=True)
        )
    )
