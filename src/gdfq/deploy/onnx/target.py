"""Targets with ONNX files, compared with the student in ONNX Runtime code by code."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from gdfq.deploy.metadata import metadata_of
from gdfq.deploy.onnx.codes import stored_codes, stored_tokens
from gdfq.deploy.onnx.form import COMPATIBLE, PACKED_WEIGHTS, Form
from gdfq.deploy.onnx.passes import PIXELS
from gdfq.deploy.onnx.session import PRECISE, onnx_calls
from gdfq.deploy.onnx.writer import to_onnx
from gdfq.deploy.runtimes import computed_in_float, onnx_runner, onnx_values
from gdfq.deploy.saturation import layers_that_may_overflow
from gdfq.deploy.target import Carrier, Job, Proof, Runtime, Target, prove_codes
from gdfq.errors import GdfqError
from gdfq.student.scheme import OF_IMAGES, PLACEMENTS

ONNX_RUNTIME = Runtime(
    "ONNX Runtime",
    "onnxruntime",
    oldest=((2, "1.24"), (3, "1.23"), (5, "1.21"), (8, "1.18")),
    calls=onnx_calls,
)
"""The type INT2 came with 1.24, a kernel that casts INT4 with 1.23, one that subtracts zero points
of INT8 with 1.21, and opset 21 with 1.18."""
COMPATIBLE_RUNTIME = replace(ONNX_RUNTIME, oldest=((2, "1.16"),))
"""ONNX Runtime 1.16 reads opset 19, and integer kernels for these operators are older."""


def write_onnx(job: Job, form: Form = PACKED_WEIGHTS, runtime: Runtime = ONNX_RUNTIME) -> bytes:
    """Return the ONNX file of an export.

    Args:
        job: The export.
        form: The variant of the file.
        runtime: The versions of ONNX Runtime that load it.
    """
    pixels = job.card.preprocessing if job.raw_input else None
    safe = not layers_that_may_overflow(job.network)
    oldest = runtime.oldest_for(job.network)
    assert oldest is not None
    metadata = metadata_of(job.card, job.accuracy or {}, safe=safe, oldest=oldest)
    return to_onnx(job.network, job.card.inputs, metadata, pixels, job.outputs, form)


def _prove(job: Job, written: Path) -> Proof:
    """Compare in a default session, or, if its sums saturate, in one without saturation."""
    data = written.read_bytes()
    try:
        return _compare(job, data, precise=False)
    except GdfqError as error:
        if not layers_that_may_overflow(job.network):
            raise
        try:
            proof = _compare(job, data, precise=True)
        except GdfqError:
            raise error from None  # saturation is not the cause
        return replace(proof, saturates_here=True)


def _compare(job: Job, data: bytes, *, precise: bool) -> Proof:
    run, values = onnx_runner(data, precise=precise), partial(onnx_values, data, precise=precise)
    stored = {**stored_codes(job.network), **stored_tokens(job.network)}
    return prove_codes(job, run, values, stored)


def _notes(job: Job, data: bytes, proof: Proof) -> list[str]:
    risky = layers_that_may_overflow(job.network)
    notes = []
    if floats := _summary(computed_in_float(data)):
        notes.append(f"computed in float: {floats}")
    if proof.saturates_here:
        notes.append(
            f"ON THIS PROCESSOR 8-BIT SUMS SATURATE (no VNNI) in up to {len(risky)} layers, "
            "and predictions differ from the student's: quantize to 7-bit weights (w7a8), or use "
            f"gdfq export --safe-x86, or the session option {'='.join(PRECISE)}, with which the "
            "file is equal"
        )
    elif risky:
        notes.append(
            f"8-bit sums may saturate on x86 processors without VNNI, in {len(risky)} of "
            f"{len(job.network.layers)} layers: 7-bit weights (w7a8) avoid it, or gdfq export "
            f"--safe-x86, or the session option {'='.join(PRECISE)}"
        )
    return notes


def _summary(nodes: Sequence[tuple[str, str]]) -> str:
    """Return layers by name and other operators by kind: `fc, 2 add, 1 silu`."""
    nodes = [(name, kind) for name, kind in nodes if not name.startswith(PIXELS)]
    layers = [name for name, kind in nodes if kind in _LAYERS and not _NO_LAYER.search(name)]
    others = Counter(
        _COMMON.get(kind, kind.lower())
        for name, kind in nodes
        if kind not in _LAYERS or _NO_LAYER.search(name)
    )
    named = others if len(others) <= _MAX_KINDS else Counter(dict(others.most_common(_MAX_KINDS)))
    rest = others.total() - named.total()
    counts = [f"{count} {kind}" for kind, count in named.items()]
    return ", ".join([*layers, *counts, *([f"{rest} others"] if rest else [])])


_MAX_KINDS = 6
"""Most kinds of operators that a note counts by name."""
_NO_LAYER = re.compile(r"(^|\.)matmul(_\d+)?($|/)")
"""Matches names of products of two activations, or of a weight that has no name."""
_LAYERS = frozenset({"Conv", "ConvTranspose", "FusedConv", "FusedGemm", "FusedMatMul", "Gemm"}) | {
    "MatMul"
}
_COMMON = {
    "AveragePool": "average pool",
    "FusedMatMul": "matmul",
    "GlobalAveragePool": "average pool",
    "QuickGelu": "silu",
}

ONNX = Target(
    "onnx",
    ".onnx",
    "runs as integers in ONNX Runtime",
    write_onnx,
    _prove,
    _notes,
    raw_input=True,
    may_saturate=True,
    runtime=ONNX_RUNTIME,
    weights=Carrier("int2, int4 or int8"),
    activations=Carrier("uint8"),
    placements=PLACEMENTS,
    equality="every code and the outputs",
    takes_size=True,
)

ONNX_COMPAT = replace(
    ONNX,
    name="onnx-compat",
    suffix=".compat.onnx",
    summary="runs in older versions of ONNX Runtime and in other runtimes; weights of 8 bits on "
    "disk",
    write=partial(write_onnx, form=COMPATIBLE, runtime=COMPATIBLE_RUNTIME),
    runtime=COMPATIBLE_RUNTIME,
    weights=Carrier("int8"),
    placements=OF_IMAGES,
    takes_size=False,
)
