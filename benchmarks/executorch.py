"""`.pte` files compared with the student and with its ONNX file: codes, size, latency.

    python -m benchmarks.executorch

Students are those of `benchmarks.litert`. Latencies are those of single images on one thread, each
file in a process of its own, the two in turn. Writes benchmarks/results/executorch.json, a row as
soon as it is done; rows that exist are kept.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from benchmarks.litert import student_of
from benchmarks.runtime import network_of
from support.places import RESULTS, SHARED

from gdfq import TARGETS
from gdfq.deploy.benchmark import Candidate, side_by_side

FILE = RESULTS / "executorch.json"
NAMES = ("cifar10_resnet20", "cifar100_resnet56", "imagenet_mobilenetv1_025")
BITS = ("w8a8", "w4a8")
KINDS = ("onnx", "executorch")


def row_of(name: str, bits: str, seconds: float) -> dict[str, object]:
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each file")
    options = parser.parse_args()
    if not SHARED.is_dir():
        sys.exit(f"skipped: the networks and images of {SHARED} are not there")
    TARGETS["executorch"].require_runtime()
    rows = json.loads(FILE.read_text()) if FILE.exists() else []
    done = {(row["network"], row["bits"]) for row in rows}
    for name in options.networks:
        for bits in (bits for bits in BITS if (name, bits) not in done):
            row = row_of(name, bits, options.seconds)
            rows = sorted(
                [*rows, row], key=lambda r: (NAMES.index(r["network"]), -BITS.index(r["bits"]))
            )
            FILE.write_text(json.dumps(rows, indent=1) + "\n")
            print(
                name,
                bits,
                f"{row['onnx_ms']:.3f} -> {row['executorch_ms']:.3f} ms",
                row["differs_first"],
            )


if __name__ == "__main__":
    main()
