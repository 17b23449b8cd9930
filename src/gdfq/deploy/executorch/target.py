"""The target `executorch`: `.pte` files for XNNPACK, compared with the student code by code."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from gdfq.deploy.executorch.calls import MAX_BATCH, executorch_calls
from gdfq.deploy.executorch.operators import unsupported
from gdfq.deploy.executorch.program import pairs_of
from gdfq.deploy.executorch.runtime import executorch_runners, lowered
from gdfq.deploy.litert.carriers import carriers_of
from gdfq.deploy.target import Carrier, Job, Proof, Runtime, Target, prove_codes


def _files(job: Job) -> list[bytes]:
    """Return the file, and one that returns the codes of all activations, too."""
    inputs = job.card.inputs
    forms = [pairs_of(job.network, inputs, with_codes=wanted) for wanted in (False, True)]
    return lowered(forms, inputs)


def _write(job: Job) -> bytes:
    return job.once(_files)[0]


def _prove(job: Job, written: Path) -> Proof:
    stored = carriers_of(job.network)
    grids = [stored[grid.name].name for grid in job.network.activations]
    with executorch_runners(written.read_bytes(), job.once(_files)[1]) as (run, with_codes):

        def values(_names: Sequence[str], inputs: Sequence[Tensor]) -> Mapping[str, Any]:
            found = with_codes(*inputs)
            names = [*job.outputs, *grids]
            return {name: value.numpy() for name, value in zip(names, found, strict=True)}

        # XNNPACK may fuse more where no codes are asked for.
        return prove_codes(job, run, values, stored, same_beside_codes=True)


def _notes(_job: Job, _data: bytes, _proof: Proof) -> Sequence[str]:
    return [f"takes up to {MAX_BATCH} images at once"]


EXECUTORCH = Target(
    "executorch",
    ".pte",
    "runs as integers in ExecuTorch (XNNPACK), on phones",
    _write,
    _prove,
    _notes,
    runtime=Runtime("ExecuTorch", "executorch", "executorch", calls=executorch_calls),
    weights=Carrier("int8"),
    activations=Carrier("int8"),
    equality="every code and the outputs, in ExecuTorch with XNNPACK",
    unsupported=unsupported,
)
