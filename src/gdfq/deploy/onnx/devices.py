"""The targets `tensorrt` and `qnn`: ONNX files of pairs for devices that are not here.

Their files follow the rules that the runtime of the device has for quantization, each of which is
checked in the written file. Numbers are proven in ONNX Runtime, which computes each operator as the
file has it. Nothing was run on the device.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from torch import fx

from gdfq.deploy.onnx import pairs
from gdfq.deploy.onnx.codes import stored_codes
from gdfq.deploy.onnx.encodings import files_with_encodings
from gdfq.deploy.onnx.form import QNN as QNN_FORM
from gdfq.deploy.onnx.form import TENSORRT as TENSORRT_FORM
from gdfq.deploy.onnx.form import Form
from gdfq.deploy.onnx.target import COMPATIBLE_RUNTIME, write_onnx
from gdfq.deploy.runtimes import onnx_runner, onnx_values
from gdfq.deploy.target import MAX_NAMED, Carrier, Job, Proof, Target, prove_codes
from gdfq.errors import GdfqError
from gdfq.functional.grid import MAX_BITS, Layout
from gdfq.graph import queries

_TENSORRT_OPSETS = (13, 20)
"""Opsets that TensorRT reads and that have scales for each channel."""
TENSORRT_RULES: Sequence[pairs.Rule] = (
    pairs.codes_are_only_dequantized,
    pairs.activations_have_one_grid(np.int8),
    pairs.all_zero_points_are_zero,
    pairs.weights_are_int8,
    pairs.biases_are_float,
    pairs.constants_need_no_cast,
    pairs.layers_read_quantized_weights_and_inputs,
    pairs.opset_is_between(*_TENSORRT_OPSETS),
)

_QNN_OPSETS = (13, 21)
QNN_RULES: Sequence[pairs.Rule] = (
    pairs.codes_are_only_dequantized,
    pairs.activations_have_one_grid(np.uint8),
    pairs.weights_are_int8,
    pairs.biases_count_in_products,
    pairs.moves_keep_their_grid,
    pairs.constants_need_no_cast,
    pairs.layers_read_quantized_weights_and_inputs,
    pairs.opset_is_between(*_QNN_OPSETS),
)


def _prove(
    job: Job, written: Path, *, form: Form, rules: Sequence[pairs.Rule], device: str
) -> Proof:
    data = written.read_bytes()
    if found := pairs.broken(rules, data):
        raise GdfqError(
            f"a file for {device} must follow its rules for quantization; {job.path.name} does "
            f"not: {'; '.join(found[:MAX_NAMED])}. It was not kept; report the network."
        )
    run, values = (
        onnx_runner(data, as_written=True),
        partial(onnx_values, data, as_written=True),
    )
    return prove_codes(job, run, values, stored_codes(job.network, form))


def _unsupported(graph: fx.Graph) -> list[str]:
    """Return transposed convolutions in groups, whose scales lie along no single axis."""
    layers = [node for node in graph.nodes if queries.is_layer(node)]
    layouts = [queries.weight_layout(node) for node in layers]
    return [
        f"{queries.layer_name(node)} (transposed convolution in groups)"
        for node, (layout, groups) in zip(layers, layouts, strict=True)
        if layout is Layout.TRANSPOSED and groups > 1
    ]


TENSORRT = Target(
    "tensorrt",
    ".tensorrt.onnx",
    "for TensorRT on NVIDIA GPUs: zero points of 0",
    partial(write_onnx, form=TENSORRT_FORM, runtime=COMPATIBLE_RUNTIME),
    partial(_prove, form=TENSORRT_FORM, rules=TENSORRT_RULES, device="TensorRT"),
    made_for="TensorRT",
    runtime=replace(COMPATIBLE_RUNTIME, oldest=(), calls=None),
    weights=Carrier("int8, code minus zero point"),
    activations=Carrier("int8", (MAX_BITS,), symmetric=True),
    placements=("full",),
    unsupported=_unsupported,
    equality="every code and the outputs, in ONNX Runtime; the rules of TensorRT",
    one_grid_for_joins=True,
)

_QNN_RUNTIME = replace(COMPATIBLE_RUNTIME, oldest=((2, "1.18"),), calls=None)
"""Opset 21 came with ONNX Runtime 1.18. Its speed on a CPU is not that of the device."""
QNN = Target(
    "qnn",
    ".qnn.onnx",
    "for QNN on Qualcomm NPUs: symmetric weights; with a float file and AIMET's encodings",
    partial(write_onnx, form=QNN_FORM, runtime=_QNN_RUNTIME),
    partial(_prove, form=QNN_FORM, rules=QNN_RULES, device="QNN"),
    beside=files_with_encodings,
    made_for="QNN",
    runtime=_QNN_RUNTIME,
    weights=Carrier("int8", symmetric=True),
    activations=Carrier("uint8", (MAX_BITS,)),
    placements=("full",),
    unsupported=_unsupported,
    equality="every code and the outputs, in ONNX Runtime; the rules of QNN",
    one_grid_for_joins=True,
)
