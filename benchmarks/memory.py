"""How much memory a whole run takes on a network of large images, by stage, and what its
checkpoints write.

    python -m benchmarks.memory                      # the whole run; writes results/memory.json
    python -m benchmarks.memory --steps 8 --iterations 4 --images 250
    python -m benchmarks.memory --memory 1GiB
    python -m benchmarks.memory --bits w4a8
    python -m benchmarks.memory --network imagenet_mobilenetv1_025 --recipe fast --bits w4a4

EfficientNet-Lite0 at 224x224 (4.65 M parameters), recipe `quick` at w8a8 by default, one thread, on a CPU: as
`gdfq quantize` runs it, with a test, checkpoints, an ONNX file and the evidence for the report, all
in one process. For each stage: seconds of CPU (one thread, so that other load hardly counts), and the highest resident size of the whole process while it
ran (VmHWM, which the kernel lets a process reset). A stage begins with the end of the one before,
so "moments" is all between the last calibration batch and the end of the first tuning step.

Fewer steps, iterations or images leave the peaks as they are and shorten the seconds. Linux only.
The network needs the extra `bench-efficientnet` and the test images of the shared folder. Without
one of them the script says so and ends.
"""

import argparse
import json
import re
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from benchmarks.trained_networks import EFFICIENTNET, MOBILE, NETWORKS, Network
from support.places import RESULTS
from torch import nn

import gdfq
from gdfq.data.datasets import load_data
from gdfq.execution.budget import MemoryBudget
from gdfq.execution.checkpoints import Checkpoints
from gdfq.execution.malloc import keep_freed_memory_
from gdfq.graph.capture import capture
from gdfq.recipes import find_recipe
from gdfq.runs.diagnostics import gather, write_evidence

FILE = RESULTS / "memory.json"


class Meter:
    """CPU seconds and the highest resident size of this process, by stage, in order."""

    def __init__(self) -> None:
        self.stages: dict[str, dict[str, float]] = {}
        self._stage, self._since = "", time.process_time()
        self._reset()

    def ends(self, stage: str) -> None:
        """Add all since the last call to a stage."""
        status = Path("/proc/self/status").read_text()
        match = re.search(r"VmHWM:\s+(\d+) kB", status)
        assert match is not None
        now = time.process_time()
        row = self.stages.setdefault(stage, {"seconds": 0.0, "peak_mib": 0.0})
        row["seconds"] = round(row["seconds"] + now - self._since, 1)
        row["peak_mib"] = max(row["peak_mib"], int(match[1]) // 1024)
        if stage != self._stage:
            print(self._stage, self.stages.get(self._stage, ""), flush=True)
        self._since, self._stage = now, stage
        self._reset()

    def hears(self, step: Any) -> None:
        """Listen to a run: "calibrate" up to the first step of tuning is matching moments."""
        moments = self._stage == "calibrate" and step.stage == "tune"
        self.ends("moments" if moments else step.stage)

    @staticmethod
    def _reset() -> None:
        Path("/proc/self/clear_refs").write_text("5")


def measured(
    model: nn.Module, folder: Path, options: argparse.Namespace, meter: Meter
) -> dict[str, Any]:
    """One run with all that the command line does, in the folder."""
    network, recipe = NETWORKS[options.network], find_recipe(options.recipe)
    source: Any = recipe.source
    if options.iterations is not None:
        source = replace(source, source=replace(source.source, iterations=options.iterations))
    recipe = replace(recipe, source=source).with_steps(options.steps)
    more: dict[str, Any] = {} if options.memory is None else {"memory": options.memory}
    checkpoints = Checkpoints(folder / "checkpoints")
    meter.ends("start")
    teacher = capture(model, torch.zeros(1, *network.shape))
    meter.ends("capture")
    quantized = gdfq.quantize(
        teacher,
        torch.zeros(1, *network.shape),
        options.bits,
        recipe,
        test=_some(network, options.images),
        mean=network.preprocessing.mean,
        std=network.preprocessing.std,
        checkpoints=checkpoints,
        listener=meter.hears,
        **more,
    )
    meter.ends("freeze")
    quantized.save(folder)
    meter.ends("save")
    quantized.export(folder / "student.onnx")
    meter.ends("export")
    write_evidence(gather(teacher, quantized, MemoryBudget.of(options.memory)), folder)
    meter.ends("evidence")
    accuracy = {name: quantized.metrics[name] for name in ("teacher", "student")}
    return {"accuracy": accuracy, "written_mb": round(checkpoints.written / 1e6, 1)}


def _some(network: Network, count: int) -> Any:
    """The first `count` test images; all as the folder itself, which reads them as needed."""
    data = load_data(network.test, network.shape, 1000)
    if count >= len(data):
        return data
    chosen = torch.arange(len(data))[:: len(data) // count][:count]
    assert data.labels is not None
    return data.images(chosen), data.labels[chosen]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", default=EFFICIENTNET, choices=(EFFICIENTNET, MOBILE))
    parser.add_argument("--recipe", default="quick", choices=("quick", "fast"))
    parser.add_argument("--bits", default="w8a8")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--iterations", type=int, help="of each image; the recipe's own by default")
    parser.add_argument("--images", type=int, default=1000, help="to test on")
    parser.add_argument("--memory", help="the budget, as 2GiB")
    parser.add_argument("--out", type=Path, default=FILE)
    options = parser.parse_args()
    try:
        model = NETWORKS[options.network].load()
    except ImportError as error:
        sys.exit(f"skipped: it needs the extra bench-efficientnet ({error})")
    if not NETWORKS[options.network].test.is_dir():
        sys.exit(f"skipped: it needs the images in {NETWORKS[options.network].test}")
    torch.set_num_threads(1)
    keep_freed_memory_()
    meter: Meter = Meter()
    with tempfile.TemporaryDirectory() as folder:
        found = measured(model, Path(folder), options, meter)
    peak = max(row["peak_mib"] for row in meter.stages.values())
    result = {
        "torch": torch.__version__,
        "network": options.network,
        "recipe": options.recipe,
        "bits": options.bits,
        "steps": options.steps,
        "iterations": options.iterations,
        "images": options.images,
        "memory": options.memory,
        "peak_mib": peak,
        **found,
        "stages": meter.stages,
    }
    for stage, row in meter.stages.items():
        print(f"{stage:12}{row['seconds']:9.1f} s{row['peak_mib']:9.0f} MiB")
    print(f"{'peak':12}{'':11}{peak:9.0f} MiB")
    print(f"{'checkpoints':12}{found['written_mb']:9.1f} MB written")
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
