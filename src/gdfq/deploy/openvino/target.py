"""The target `openvino`: an ONNX file that OpenVINO computes as the student does."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from torch import fx

from gdfq.deploy.onnx.codes import stored_codes
from gdfq.deploy.onnx.form import UNFUSED_SUMS
from gdfq.deploy.onnx.target import write_onnx
from gdfq.deploy.openvino.calls import FLOAT32, openvino_calls
from gdfq.deploy.openvino.runtime import openvino_runner, openvino_values
from gdfq.deploy.target import Carrier, Job, Proof, Runtime, Target, prove_codes
from gdfq.graph import operators


def _prove(job: Job, written: Path) -> Proof:
    data = written.read_bytes()
    run, values = openvino_runner(data), partial(openvino_values, data)
    return prove_codes(job, run, values, stored_codes(job.network), same_beside_codes=True)


def _unsupported(graph: fx.Graph) -> list[str]:
    """Return resizing with anti-aliasing, which OpenVINO computes otherwise than PyTorch."""
    return [
        f"{node.name} ({operators.short_name(node)})"
        for node in graph.nodes
        if operators.name_of(node) in operators.ANTIALIASED
    ]


def _notes(_job: Job, _data: bytes, _proof: Proof) -> Sequence[str]:
    ((name, value),) = FLOAT32.items()
    return [f"compile it with {name}={value}: OpenVINO rounds floats to 16 bits on some processors"]


OPENVINO = Target(
    "openvino",
    ".openvino.onnx",
    "runs as integers in OpenVINO",
    partial(write_onnx, form=UNFUSED_SUMS),
    _prove,
    _notes,
    raw_input=True,
    runtime=Runtime("OpenVINO", "openvino", "openvino", calls=openvino_calls),
    weights=Carrier("int4 or int8"),
    activations=Carrier("uint8"),
    placements=("full",),
    unsupported=_unsupported,
    equality=f"every code and the outputs, in OpenVINO with {'='.join(*FLOAT32.items())}",
)
