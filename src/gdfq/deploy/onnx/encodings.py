"""A float ONNX file with the encodings of its tensors, as AIMET writes them (version 0.6.1).

Converters such as Qualcomm's read a float network and, by the names of its tensors, how each is
quantized. An encoding has `bitwidth`, `scale`, `offset` (the negative of the zero point of unsigned
codes), `min` = scale · offset and `max` = scale · (2^bitwidth − 1 + offset).
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from gdfq.deploy.parity import FROM_EQUAL_CODES, Parity
from gdfq.deploy.runtimes import onnx_runner
from gdfq.deploy.target import Job
from gdfq.errors import GdfqError

FLOAT_SUFFIX, ENCODINGS_SUFFIX = ".qnn-float.onnx", ".qnn.encodings"
_VERSION = "0.6.1"
_NARROW_BITS, _WIDE_BITS = 4, 8
"""Bits of weights that encodings have: others are held in the next wider."""

Array = np.ndarray[Any, Any]
Encoding = Mapping[str, object]


def files_with_encodings(job: Job, data: bytes) -> dict[str, bytes]:
    """Return the float file and the encodings that say the same as a file of pairs.

    Args:
        job: The export.
        data: Contents of the file, whose codes are read by DequantizeLinear alone.

    Returns:
        Contents by the ends of their names.

    Raises:
        GdfqError: The float file does not compute what the student does without rounding.
    """
    bits = {f"{weight.name}.weight": weight.bits for weight in job.network.weights}
    model, encodings = without_pairs(data, bits)
    _check(job, model)
    text = json.dumps(encodings, indent=1) + "\n"
    return {FLOAT_SUFFIX: model, ENCODINGS_SUFFIX: text.encode()}


def without_pairs(data: bytes, weight_bits: Mapping[str, int]) -> tuple[bytes, dict[str, Any]]:
    """Return a file of pairs without them, and the encodings of its tensors.

    A tensor that is rounded to a second grid becomes another tensor there, by an Identity.

    Args:
        data: Contents of the file.
        weight_bits: Bits of the student's weights, by the names of their codes.
    """
    import onnx

    model = onnx.load_from_string(data)
    graph = model.graph
    constants = {value.name: onnx.numpy_helper.to_array(value) for value in graph.initializer}
    quantizers = {node.output[0]: node for node in graph.node if node.op_type == "QuantizeLinear"}
    floats: dict[str, str] = {}  # by dequantized tensor
    parameters: dict[str, Array] = {}
    again: dict[str, Any] = {}  # copies by the tensor that is rounded to a second grid
    activations: dict[str, list[Encoding]] = {}
    weights: dict[str, list[Encoding]] = {}
    for node in (node for node in graph.node if node.op_type == "DequantizeLinear"):
        (output,), (codes, scale_name, *zero_points) = node.output, node.input
        scale = constants[scale_name]
        if codes in quantizers:
            name = floats.get(quantizers[codes].input[0], quantizers[codes].input[0])
            found = [_of_activation(scale, constants[zero_points[0]])]
            if activations.setdefault(name, found) != found:
                again[output] = onnx.helper.make_node("Identity", [name], [output])
                activations[output] = found
            floats[output] = output if output in again else name
            continue
        name = codes if codes not in parameters else output
        floats[output] = name
        axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
        shape = [1] * constants[codes].ndim
        if scale.ndim:
            shape[axis] = -1
        parameters[name] = constants[codes].astype(np.float32) * scale.reshape(shape)
        if constants[codes].dtype == np.int8:
            weights[name] = [_of_weight(s, weight_bits[codes]) for s in scale.reshape(-1)]
    kept = [
        again.get(node.output[0], node)
        for node in graph.node
        if node.op_type not in {"QuantizeLinear", "DequantizeLinear"} or node.output[0] in again
    ]
    for node in kept:
        for index, name in enumerate(node.input):
            node.input[index] = floats.get(name, name)
    used = {name for node in kept for name in node.input}
    values = {name: array for name, array in (constants | parameters).items() if name in used}
    del graph.node[:], graph.initializer[:]
    graph.node.extend(kept)
    graph.initializer.extend(onnx.numpy_helper.from_array(a, name) for name, a in values.items())
    onnx.checker.check_model(model)
    encodings = {
        "version": _VERSION,
        "activation_encodings": activations,
        "param_encodings": weights,
    }
    return bytes(model.SerializeToString(deterministic=True)), encodings


def _of_activation(scale: Array, zero_point: Array) -> Encoding:
    return _encoding(float(scale), -int(zero_point), _WIDE_BITS, symmetric=False)


def _of_weight(scale: Any, bits: int) -> Encoding:
    held = _NARROW_BITS if bits <= _NARROW_BITS else _WIDE_BITS
    return _encoding(float(scale), -(2 ** (held - 1)), held, symmetric=True)


def _encoding(scale: float, offset: int, bits: int, *, symmetric: bool) -> Encoding:
    return {
        "bitwidth": bits,
        "dtype": "int",
        "is_symmetric": str(symmetric),
        "max": scale * (2**bits - 1 + offset),
        "min": scale * offset,
        "offset": offset,
        "scale": scale,
    }


@torch.no_grad()
def _check(job: Job, model: bytes) -> None:
    """Raise GdfqError if a float file does not compute the student without rounding."""
    inside, _ = job.inputs()
    expected = job.network.as_float().outputs(*inside.student)
    actual = onnx_runner(model, as_written=True)(*inside.file)
    error = Parity.of(expected, actual, classes=False).relative_error
    if not error <= FROM_EQUAL_CODES:
        raise GdfqError(
            "a float file with encodings must give the student's outputs without rounding; that "
            f"of {job.path.name} is {error:.2%} off. It was not kept; report the network."
        )
