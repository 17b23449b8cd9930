"""`.tflite` files compared with the student and with its ONNX file: codes, size, latency.

    python -m benchmarks.litert

Each network is calibrated on 64 test images and tuned for 4 steps, which is enough to compare
files, and exported for both targets. Latencies are those of single images on one thread, the two
files in turn, so that other load affects both. Writes benchmarks/results/litert.json, a row as soon
as it is done; rows that exist are kept.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from benchmarks.runtime import network_of
from benchmarks.trained_networks import NETWORKS
from support.places import RESULTS, SHARED
from torch import Tensor

import gdfq
from gdfq import TARGETS
from gdfq.data.datasets import load_data
from gdfq.deploy.litert.runtime import LiteInterpreter, litert_runner
from gdfq.deploy.onnx.session import onnx_session
from gdfq.deploy.runtimes import onnx_runner
from gdfq.quantized import QuantizedNetwork
from gdfq.recipes import find_recipe
from gdfq.sources.given import GivenImages
from gdfq.sources.pool import ImagePool

FILE = RESULTS / "litert.json"
NAMES = (
    "cifar10_resnet20",
    "cifar10_resnet32",
    "cifar100_resnet56",
    "imagenet_mobilenetv1_025",
)
BITS = ("w8a8", "w4a8", "w4a4")
Row = dict[str, Any]
IMAGES, COMPARED = 64, 500
"""Images that ranges are calibrated on, and images on which classes are compared."""


def student_of(name: str, bits: str) -> QuantizedNetwork:
    model, shape, preprocessing = network_of(name)
    test = load_data(SHARED / "data" / NETWORKS[name].test, shape, 1000)
    data = preprocessing(test.images(torch.arange(IMAGES)))
    pool = ImagePool(GivenImages(batch=16), images=IMAGES, batch=16)
    recipe = replace(find_recipe("fast").with_steps(4), source=pool)
    return gdfq.quantize(
        model, torch.zeros(1, *shape), bits, recipe, data=data, placement="full",
        mean=preprocessing.mean, std=preprocessing.std,
    )  # fmt: skip


def latencies(calls: Sequence[Callable[[], object]], seconds: float) -> list[float]:
    """Median milliseconds of each call, made in turn."""
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    until = time.perf_counter() + seconds * len(calls)
    while time.perf_counter() < until:
        for call, found in zip(calls, times, strict=True):
            started = time.perf_counter()
            call()
            found.append(1000 * (time.perf_counter() - started))
    return [statistics.median(found) for found in times]


def image_call(data: bytes, image: Tensor) -> Callable[[], object]:
    """A call of a `.tflite` file on one image that is already in place."""
    loaded = LiteInterpreter(data)
    loaded([image])
    return loaded.interpreter.invoke


def row_of(name: str, bits: str, seconds: float) -> Row:
    student = student_of(name, bits)
    _, shape, preprocessing = network_of(name)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"student.{suffix}" for suffix in ("onnx", "tflite")]
        exported = [student.export(path) for path in paths]
        onnx, tflite = (path.read_bytes() for path in paths)
    session = onnx_session(onnx, 1)
    one = torch.randn(1, *shape)
    feed = {session.get_inputs()[0].name: one.numpy()}
    calls = [lambda: session.run(None, feed), image_call(tflite, one)]
    onnx_ms, litert_ms = latencies(calls, seconds)
    test = load_data(SHARED / "data" / NETWORKS[name].test, shape, 1000)
    runs = [onnx_runner(onnx), litert_runner(tflite)]
    chosen = torch.arange(min(COMPARED, len(test))).split(50)
    logits = [
        torch.cat([run(preprocessing(test.images(part)))[0] for part in chosen]) for run in runs
    ]
    first, second = (values.argmax(1) for values in logits)
    return {
        "network": name,
        "bits": bits,
        "onnx_bytes": len(onnx),
        "litert_bytes": len(tflite),
        "onnx_ms": onnx_ms,
        "litert_ms": litert_ms,
        "relative_error": exported[1].inside.relative_error,
        "relative_error_beyond": exported[1].beyond.relative_error,
        "differs_first": exported[1].differs_first,
        "same_class_percent": 100 * float((first == second).double().mean()),
    }


def measure_rows(
    description: str | None, file: Path, row_of: Callable[[str, str, float], Row], kind: str
) -> None:
    """Measure the rows that a file of results does not have, and write each as soon as it is done.

    Args:
        description: Of the command.
        file: The file of results.
        row_of: Measures a network at some bits, each file for so many seconds.
        kind: The target that is compared with ONNX files.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each file")
    options = parser.parse_args()
    if not SHARED.is_dir():
        sys.exit(f"skipped: the networks and images of {SHARED} are not there")
    TARGETS[kind].require_runtime()
    rows = json.loads(file.read_text()) if file.exists() else []
    done = {(row["network"], row["bits"]) for row in rows}
    for name in options.networks:
        for bits in (bits for bits in BITS if (name, bits) not in done):
            row = row_of(name, bits, options.seconds)
            rows = sorted(
                [*rows, row], key=lambda r: (NAMES.index(r["network"]), -BITS.index(r["bits"]))
            )
            file.write_text(json.dumps(rows, indent=1) + "\n")
            print(
                name,
                bits,
                f"{row['onnx_ms']:.3f} -> {row[f'{kind}_ms']:.3f} ms",
                row["differs_first"],
            )


def main() -> None:
    measure_rows(__doc__, FILE, row_of, "litert")


if __name__ == "__main__":
    main()
