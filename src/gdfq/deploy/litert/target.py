"""The target `litert`: files of `writer`, compared with the student in LiteRT code by code."""

from pathlib import Path

import torch

from gdfq.deploy.litert.carriers import carriers_of
from gdfq.deploy.litert.runtime import litert_runner, litert_values
from gdfq.deploy.litert.writer import WrittenFile, to_litert, unsupported
from gdfq.deploy.metadata import facts_of
from gdfq.deploy.parity import FROM_EQUAL_CODES, CodesParity, Parity, compare_codes
from gdfq.deploy.target import (
    MAX_NAMED,
    Carrier,
    Examples,
    Job,
    Proof,
    Runtime,
    Target,
    compare,
)
from gdfq.errors import GdfqError


def _file(job: Job) -> WrittenFile:
    known = {name: text for name, text in facts_of(job.card, job.accuracy or {}).items() if text}
    pixels = job.card.preprocessing if job.raw_input else None
    return to_litert(job.network, job.card.inputs, known, job.outputs, pixels)


def _write(job: Job) -> bytes:
    return _file(job).data


def _prove(job: Job, written: Path) -> Proof:
    data, orders = written.read_bytes(), _file(job).orders
    run = litert_runner(data)

    def of(examples: Examples) -> tuple[Parity, list[CodesParity]]:
        found = litert_values(data, orders, examples.file)
        codes, expected = compare_codes(
            job.network, examples.student, found, carriers_of(job.network)
        )
        actual = [torch.from_numpy(found[name].copy()) for name in job.outputs]
        parity = compare(job, run, examples, codes, actual)
        error = Parity.of(expected, actual, classes=False).relative_error
        if not error <= FROM_EQUAL_CODES:
            raise GdfqError(
                "outputs must differ by the rounding of floats alone where codes are equal; those "
                f"of {job.path.name} are {error:.2%} off. It was not kept; report the network."
            )
        return parity, codes

    (inside, codes), (beyond, _) = map(of, job.inputs())
    differing = [(found.name, found.differ) for found in codes if found.differ]
    return Proof(inside, beyond, tuple(differing[:MAX_NAMED]))


LITERT = Target(
    "litert",
    ".tflite",
    "runs as integers in LiteRT (TensorFlow Lite)",
    _write,
    _prove,
    raw_input=True,
    runtime=Runtime("LiteRT", "ai_edge_litert", "litert"),
    weights=Carrier("int8"),
    activations=Carrier("int8"),
    layout="nhwc",
    equality="every code and the outputs, with XNNPACK",
    unsupported=unsupported,
)
