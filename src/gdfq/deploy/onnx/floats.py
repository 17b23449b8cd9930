"""The target `onnx-fp8`: floating-point grids as the floats of 8 bits that ONNX has."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from gdfq.deploy.onnx.codes import stored_codes
from gdfq.deploy.onnx.sizes import STORED_FLOATS
from gdfq.deploy.onnx.target import ONNX_RUNTIME, write_onnx
from gdfq.deploy.runtimes import onnx_runner, onnx_values
from gdfq.deploy.target import Carrier, Job, Proof, Target, prove_codes
from gdfq.functional.float_grid import E4M3, E5M2

_RUNTIME = replace(ONNX_RUNTIME, oldest=((4, "1.32"),))
"""The oldest version that was tried."""


@dataclass(frozen=True)
class StoredNumbers:
    """The numbers of an activation on a floating-point grid in a file, as floats."""

    name: str
    """Name of the value in the graph."""


def _prove(job: Job, written: Path) -> Proof:
    data = written.read_bytes()
    integers = stored_codes(job.network)
    stored = {
        grid.name: integers[grid.name] if grid.form is None else StoredNumbers(f"{grid.name}.dq")
        for grid in job.network.activations
    }
    return prove_codes(job, onnx_runner(data), partial(onnx_values, data), stored)


ONNX_FP8 = Target(
    "onnx-fp8",
    ".fp8.onnx",
    "floating-point grids in ONNX Runtime, computed in float",
    partial(write_onnx, runtime=_RUNTIME),
    _prove,
    raw_input=True,
    may_saturate=True,
    runtime=_RUNTIME,
    weights=Carrier("float8, int2, int4 or int8", formats=tuple(STORED_FLOATS)),
    activations=Carrier("float8 or uint8", formats=(E4M3, E5M2)),
    equality="every number on a grid and the outputs",
)
