"""The target `litert`: files of `writer`, compared with the student in LiteRT code by code."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from gdfq.deploy.litert.calls import litert_calls
from gdfq.deploy.litert.carriers import carriers_of
from gdfq.deploy.litert.runtime import litert_runner, litert_values
from gdfq.deploy.litert.writer import WrittenFile, to_litert, unsupported
from gdfq.deploy.metadata import facts_of
from gdfq.deploy.target import Carrier, Job, Proof, Runtime, Target, prove_codes


def _file(job: Job) -> WrittenFile:
    known = {name: text for name, text in facts_of(job.card, job.accuracy or {}).items() if text}
    pixels = job.card.preprocessing if job.raw_input else None
    return to_litert(job.network, job.card.inputs, known, job.outputs, pixels)


def _write(job: Job) -> bytes:
    return job.once(_file).data


def _prove(job: Job, written: Path) -> Proof:
    data, orders = written.read_bytes(), job.once(_file).orders

    def values(_names: Sequence[str], inputs: Sequence[Tensor]) -> Mapping[str, Any]:
        return litert_values(data, orders, inputs)  # these are all names

    return prove_codes(job, litert_runner(data), values, carriers_of(job.network))


def _notes(job: Job, _data: bytes, _proof: Proof) -> Sequence[str]:
    maps = any(len(spec.shape) == 3 for spec in job.card.inputs)
    order = ["maps are [N, H, W, C] in the file, inputs and outputs alike"] if maps else []
    return [*order, "takes one input at a time until the application resizes its input tensor"]


LITERT = Target(
    "litert",
    ".tflite",
    "runs as integers in LiteRT (TensorFlow Lite)",
    _write,
    _prove,
    _notes,
    raw_input=True,
    runtime=Runtime("LiteRT", "ai_edge_litert", "litert", calls=litert_calls),
    weights=Carrier("int8"),
    activations=Carrier("int8"),
    layout="nhwc",
    equality="every code and the outputs, with XNNPACK",
    unsupported=unsupported,
)
