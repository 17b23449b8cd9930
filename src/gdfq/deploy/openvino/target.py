"""The target `openvino`: an ONNX file that OpenVINO computes as the student does."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from operator import gt
from pathlib import Path

from torch import Tensor, fx

from gdfq.deploy.onnx import form
from gdfq.deploy.onnx.codes import stored_codes
from gdfq.deploy.onnx.target import ONNX_RUNTIME, write_onnx
from gdfq.deploy.openvino.calls import FLOAT32, openvino_calls
from gdfq.deploy.openvino.runtime import openvino_runner, openvino_values
from gdfq.deploy.refusal import refused
from gdfq.deploy.saturation import layers_that_may_overflow
from gdfq.deploy.target import Carrier, Job, Proof, Runtime, Target, prove_codes
from gdfq.errors import GdfqError
from gdfq.functional.windows import per_axis
from gdfq.graph import operators, queries


def _prove(job: Job, written: Path) -> Proof:
    data = written.read_bytes()
    run, values = openvino_runner(data), partial(openvino_values, data)
    try:
        return prove_codes(job, run, values, stored_codes(job.network), same_beside_codes=True)
    except GdfqError as error:
        risky = layers_that_may_overflow(job.network)
        if not risky:
            raise
        raise GdfqError(
            f"{error} On x86 processors without VNNI 8-bit sums of OpenVINO saturate, here in up "
            f"to {len(risky)} of {len(job.network.layers)} layers. If this is such a processor, "
            "quantize to 7-bit weights (w7a8), or use gdfq export --safe-x86."
        ) from None


def _unsupported(graph: fx.Graph) -> list[str]:
    """Return what OpenVINO computes otherwise than PyTorch.

    It is resizing with anti-aliasing, variances (a quotient by one was 77 % off), averages of
    windows that reach beyond the border, circular padding, which it does not read, and transposed
    convolutions whose stride is larger than their kernel.
    """
    return refused(graph, lambda node, _: not any(wrong(node) for wrong in _WRONG))


def _is_wrong_for_all(node: fx.Node) -> bool:
    return operators.name_of(node) in operators.ANTIALIASED | operators.VARIANCES


def _strides_beyond_the_kernel(node: fx.Node) -> bool:
    """Return whether a transposed convolution leaves gaps, where OpenVINO's codes are wrong.

    A graph that does not know its shapes is not judged; its file is compared.
    """
    if operators.name_of(node) not in operators.TRANSPOSED_CONVOLUTIONS:
        return False
    weight = queries.weight_of(node).meta.get("val")
    stride, *_ = queries.options_of(node) or (1,)
    if not isinstance(weight, Tensor):
        return False
    kernel = weight.shape[2:]
    return any(map(gt, per_axis(stride, len(kernel)), kernel))


def _averages_beyond_the_border(node: fx.Node) -> bool:
    """Return whether a window of average pooling with a counted border reaches beyond it.

    OpenVINO divides its sum by another number. A graph that does not know its shapes is not
    judged; its file is compared.
    """
    pool = queries.average_pooling_of(node)
    if pool is None or not pool.ceil_mode or not pool.count_include_pad or pool.divisor_override:
        return False
    value = queries.input_of(node).meta.get("val")
    if not isinstance(value, Tensor):
        return False
    sides = [int(side) for side in value.shape[2:]]
    options = pool.kernel_size, pool.stride or pool.kernel_size, pool.padding
    return any(map(_reaches_beyond, sides, *(per_axis(each, len(sides)) for each in options)))


def _reaches_beyond(side: int, kernel: int, stride: int, padding: int) -> bool:
    """Return whether the last window along an axis with a border begins before and ends behind."""
    room = side + 2 * padding - kernel
    last = (room // stride + 1) * stride
    return padding > 0 and room % stride != 0 and last < side + padding


_WRONG = (
    _is_wrong_for_all,
    _averages_beyond_the_border,
    queries.pads_circularly,
    _strides_beyond_the_kernel,
)


def _notes(_job: Job, _data: bytes, _proof: Proof) -> Sequence[str]:
    ((name, value),) = FLOAT32.items()
    return [f"compile it with {name}={value}: OpenVINO rounds floats to 16 bits on some processors"]


_ONNX_RUNTIME = replace(ONNX_RUNTIME, oldest=((2, "1.23"), *ONNX_RUNTIME.oldest[2:]))
"""The versions of ONNX Runtime that load the file, whose weights of 2 bits are INT4."""

OPENVINO = Target(
    "openvino",
    ".openvino.onnx",
    "runs as integers in OpenVINO",
    partial(write_onnx, form=form.OPENVINO, runtime=_ONNX_RUNTIME),
    _prove,
    _notes,
    raw_input=True,
    may_saturate=True,
    runtime=Runtime(
        "OpenVINO",
        "openvino",
        "openvino",
        oldest=((2, "2024.4"), (5, "2023.3")),
        calls=openvino_calls,
    ),
    weights=Carrier("int4 or int8"),
    activations=Carrier("uint8"),
    placements=("full",),
    unsupported=_unsupported,
    equality=f"every code and the outputs, in OpenVINO with {'='.join(*FLOAT32.items())}",
)
