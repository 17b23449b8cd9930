"""`.pte` files compared with the student and with its ONNX file: codes, size, latency.

    python -m benchmarks.executorch

Students and rows are those of `benchmarks.litert`. Latencies are those of single images on one thread, each
file in a process of its own, the two in turn. Writes benchmarks/results/executorch.json, a row as
soon as it is done; rows that exist are kept.
"""

import tempfile
from pathlib import Path

from benchmarks.litert import Row, measure_rows, student_of
from benchmarks.runtime import network_of
from support.places import RESULTS

from gdfq import TARGETS
from gdfq.deploy.benchmark import Candidate, side_by_side

FILE = RESULTS / "executorch.json"
KINDS = ("onnx", "executorch")


def row_of(name: str, bits: str, seconds: float) -> Row:
    student = student_of(name, bits)
    _, shape, _ = network_of(name)
    with tempfile.TemporaryDirectory() as folder:
        exported = [student.export(Path(folder) / TARGETS[kind].file_name) for kind in KINDS]
        files = []
        for one, kind in zip(exported, KINDS, strict=True):
            runtime = TARGETS[kind].runtime
            assert runtime is not None
            files.append(Candidate(kind, one.path, runtime))
        ((onnx, executorch),) = side_by_side(
            files, [shape], seconds=seconds, batches=[1], threads=[1]
        )
    pte = exported[1]
    return {
        "network": name,
        "bits": bits,
        "onnx_bytes": exported[0].bytes,
        "executorch_bytes": pte.bytes,
        "onnx_ms": onnx.median,
        "executorch_ms": executorch.median,
        "relative_error": pte.inside.relative_error,
        "relative_error_beyond": pte.beyond.relative_error,
        "differs_first": pte.differs_first,
    }


def main() -> None:
    measure_rows(__doc__, FILE, row_of, "executorch")


if __name__ == "__main__":
    main()
