"""What a GPU makes of it: steps replayed as CUDA graphs against launched ones, and large networks.

    python -m benchmarks.gpu steps      # time of an iteration on images and of a step, both ways
    python -m benchmarks.gpu large      # whole runs on ResNet-50 and ViT-B/16 of random weights
    python -m benchmarks.gpu            # writes docs/research/gpu.md from what was measured

`steps`: recipe `quick` at w3a3 and `paper` at w4a4, each with few images and steps; the time is the
median of the later half of the intervals between reports, which wait for the GPU. *launched* is the
same code with `gdfq.execution.replay` recording nothing.

`large`: `quick` (and `patches` for the transformer, which has no batch norms) at 224x224, whole runs
with their stages; memory is the most that PyTorch took on the GPU.

Rows are added to results/gpu.json. Needs a GPU, and the extra `torchvision` for `large`.
"""

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import torch
from benchmarks.trained_networks import EFFICIENTNET, IMAGENET, MOBILE, NETWORKS, R20, R56
from support.places import RESULTS, ROOT
from torch import nn

import gdfq
from gdfq.data.preprocessing import Preprocessing
from gdfq.execution.progress import Step
from gdfq.execution.replay import Replayed

FILE = RESULTS / "gpu.json"
PAGE = ROOT / "docs" / "research" / "gpu.md"
Row = dict[str, Any]

STEPS = [
    (R20, "quick", "w3a3"),
    (R20, "paper", "w4a4"),
    (EFFICIENTNET, "quick", "w3a3"),
    (R56, "quick", "w3a3"),
    (MOBILE, "quick", "w3a3"),
]
LARGE = [
    ("resnet50", "quick", "w8a8"),
    ("resnet50", "quick", "w3a3"),
    ("vit_b_16", "patches", "w8a8"),
    ("vit_b_16", "patches", "w3a3"),
]
FEW = {"quick": {"images": 128, "iterations": 60, "steps": 60}, "paper": {"steps": 1000}}


@contextmanager
def launched() -> Iterator[None]:
    """Within it no step is recorded."""
    with patch.object(Replayed, "_record", lambda self, _: self._function):
        yield


def run(
    model: nn.Module,
    shape: tuple[int, ...],
    preprocessing: Preprocessing,
    bits: str,
    recipe: str,
    **options: Any,
) -> Row:
    """Quantize on the GPU; return the seconds of its stages, its peak, and the reports' times."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    reports: dict[str, list[float]] = defaultdict(list)

    def listen(step: Step) -> None:
        reports[step.stage].append(time.perf_counter())

    started = time.perf_counter()
    result = gdfq.quantize(
        model,
        torch.zeros(1, *shape),
        bits=bits,
        recipe=recipe,
        mean=preprocessing.mean,
        std=preprocessing.std,
        device="cuda",
        listener=listen,
        **options,
    )
    return {
        "seconds": round(time.perf_counter() - started, 1),
        "stages": {
            name: round(value, 1)
            for name, value in result.metrics["seconds"].items()
            if name != "total"
        },
        "peak_mib": round(torch.cuda.max_memory_reserved() / 2**20),
        "milliseconds": {name: later_half(times) for name, times in reports.items()},
    }


def later_half(times: list[float]) -> float | None:
    """Median milliseconds between reports, of the later half."""
    gaps = [1000 * (b - a) for a, b in pairwise(times)]
    return round(statistics.median(gaps[len(gaps) // 2 :]), 2) if gaps else None


def measure_steps(add: Callable[[Row], None]) -> None:
    for name, recipe, bits in STEPS:
        network = NETWORKS[name]
        for way in ("launched", "replayed"):
            with launched() if way == "launched" else nullcontext():
                made = run(
                    network.load(),
                    network.shape,
                    network.preprocessing,
                    bits,
                    recipe,
                    **FEW[recipe],
                )
            row = {"kind": "steps", "network": name, "recipe": recipe, "bits": bits, "way": way}
            add({**row, **made})


def measure_large(add: Callable[[Row], None]) -> None:
    from torchvision import models

    shape = (3, 224, 224)
    for name, recipe, bits in LARGE:
        torch.manual_seed(0)
        model = getattr(models, name)().eval()
        row = {"kind": "large", "network": name, "recipe": recipe, "bits": bits}
        add({**row, **run(model, shape, IMAGENET, bits, recipe)})


INTRODUCTION = """
`fast` ran to its end on ResNets of CIFAR, MobileNetV1 and EfficientNet-Lite0, `real` on the ResNets, and `quick`, `paper`, `genie`, `synq`,
`zeroq` and `round` on ResNet-20 ([accuracies](../benchmarks.md)); so did `tests/devices/test_gpu.py`, which compares replayed steps with
launched ones and students of both devices. An ONNX file that was written there gave the student's outputs (w4a4, ResNet-20, one run:
100.0 % same predictions, outputs 0 apart). Not run: several GPUs, runs that resume, ViT-B (the older torch there could not capture
torchvision's), language models and denoisers, and a torch as new as the package asks for.

Two things that no simulated GPU showed:

- **TF32.** By PyTorch's default a GPU rounds the factors of convolutions to 11 bits. Runs, students and measurements turn
  that off, because float32 is what files are compared in. It costs time: a step of `paper` took 14 ms with TF32 (one run that left no
  row), 28 without.
- **Numbers read in each step.** Quantizers read the scale and the zero point of each activation, for which a GPU waits. It computes
  with them as tensors now.
"""


def page(rows: list[Row]) -> str:
    """The page of what was measured."""
    devices = sorted({f"{row['device']}, torch {row['torch']}" for row in rows})
    lines = [
        "# On a GPU\n",
        "`python -m benchmarks.gpu` writes this page; do not edit it. "
        f"Measured on: {'; '.join(devices)}; one run each.\n",
        INTRODUCTION,
        "## Steps replayed as CUDA graphs\n",
        "Milliseconds, median of the later half of a short run. A step of `paper` is one update of the generator "
        "and one of the student.\n",
        "| network | recipe | bits | images: launched | replayed | step: launched | replayed |",
        "| --- |" + " --- |" * 6,
    ]
    by_way: dict[Any, Row] = defaultdict(dict)
    for row in rows:
        if row["kind"] == "steps":
            by_way[row["network"], row["recipe"], row["bits"]][row["way"]] = row["milliseconds"]
    for (network, recipe, bits), ways in by_way.items():
        cells = [
            f"{ways[way][stage]:.1f}" if ways.get(way, {}).get(stage) else ""
            for stage in ("images", "tune")
            for way in ("launched", "replayed")
        ]
        lines.append(f"| {network} | `{recipe}` | {bits} | {' | '.join(cells)} |")
    lines += [
        "\n## Whole runs on large networks\n",
        "224x224, random weights, every stage from capture to the frozen student. Memory is what PyTorch allocated; what a "
        "recording keeps for itself comes on top (later rows count it).\n",
        "| network | recipe | bits | seconds | of these: stages | peak on the GPU, MiB |",
        "| --- |" + " --- |" * 5,
    ]
    for row in rows:
        if row["kind"] == "large":
            stages = ", ".join(
                f"{name} {value:g}" for name, value in row["stages"].items() if value
            )
            lines.append(
                f"| {row['network']} | `{row['recipe']}` | {row['bits']} | {row['seconds']:g} | {stages} "
                f"| {row['peak_mib']:,} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=("steps", "large"))
    options = parser.parse_args()
    rows: list[Row] = json.loads(FILE.read_text()) if FILE.exists() else []
    if options.what is None:
        PAGE.write_text(page(rows))
        return
    if not torch.cuda.is_available():
        sys.exit("skipped: there is no GPU here")

    def add(row: Row) -> None:
        row |= {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
        print(json.dumps(row), flush=True)
        rows.append(row)
        FILE.write_text(json.dumps(rows, indent=1) + "\n")

    {"steps": measure_steps, "large": measure_large}[options.what](add)


if __name__ == "__main__":
    main()
