"""How much faster several processes are than one: a table, and benchmarks/results/scaling.json.

    python -m benchmarks.scaling [--processes 1 2] [--rounds 3]

CIFAR-10 ResNet-20 (random weights: time does not depend on them), one thread a process, gloo. The
work is the same for any number of processes: four batches of images, steps of `fast`, steps of
`paper` (one of the generator and one of the student). The numbers of processes are measured in turn,
round by round; the table has medians and, in brackets, the least and the most. The machine must
have a core for each process and nothing else to do.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from support.narrowing import instance
from support.places import RESULTS, ROOT
from support.real_networks import cifar10_resnet20

from gdfq.execution.context import Context
from gdfq.execution.distributed import Group, joined
from gdfq.execution.progress import Step
from gdfq.execution.seeding import stream
from gdfq.functional.grid import Bits
from gdfq.graph.capture import capture
from gdfq.recipes import FAST, PAPER, Recipe
from gdfq.sources.base import Batch
from gdfq.sources.pool import ImagePool
from gdfq.sources.spectral import SpectralSource
from gdfq.student.build import build_student
from gdfq.student.scheme import Placement, Scheme
from gdfq.tuning.calibrate import calibrate_
from gdfq.tuning.distill import Distillation, tune_

STEPS, BATCHES, ITERATIONS = 6, 4, 5


def work(group: Group) -> dict[str, float]:
    """Seconds of each part of the work: of all images, and of a step, the first step left out."""
    teacher = capture(cifar10_resnet20(), torch.zeros(1, 3, 32, 32))
    images = torch.randn(100, 3, 32, 32, generator=stream(0, "scaling"))
    batch = Batch(
        (images.contiguous(memory_format=torch.channels_last),), torch.arange(100) % 10, None
    )
    spectral = replace(
        instance(instance(FAST.source, ImagePool).source, SpectralSource), iterations=ITERATIONS
    )

    def tuned(batches: Iterable[Batch], recipe: Recipe, placement: Placement) -> float:
        student = build_student(
            teacher, Scheme(Bits(4, 4), placement), quantizers=recipe.quantizers
        )
        calibrate_(student, [batch], steps=1)
        ended: list[float] = []

        def note(_: Step) -> None:
            ended.append(time.perf_counter())

        tune_(
            student,
            teacher,
            batches,
            instance(recipe.tuning, Distillation),
            first_step=0,
            total_steps=STEPS,
            context=Context(listener=note, group=group),
        )
        return (ended[-1] - ended[0]) / (STEPS - 1)

    group.wait()
    started = time.perf_counter()
    list(spectral.stream(teacher, steps=BATCHES, context=Context(group=group)))
    made = time.perf_counter() - started
    generated = PAPER.source.stream(teacher, steps=STEPS, context=Context(group=group))
    return {
        f"{BATCHES} batches of images": made,
        "step of fast": tuned([batch] * STEPS, FAST, "full"),
        "step of paper": tuned(generated, PAPER, "relu"),
    }


def measured(processes: int) -> dict[str, float]:
    """What `work` finds in so many fresh processes."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "seconds.json"
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        subprocess.run(
            [sys.executable, *launch, "-m", "benchmarks.scaling", "--work", str(out)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=True,
        )
        return json.loads(out.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        torch.set_num_threads(1)
        with joined(torch.device("cpu")) as group:
            seconds = work(group)
            if group.rank == 0:
                arguments.work.write_text(json.dumps(seconds))
        return
    rounds = [
        {count: measured(count) for count in arguments.processes} for _ in range(arguments.rounds)
    ]
    found = {
        name: {count: [seconds[count][name] for seconds in rounds] for count in arguments.processes}
        for name in rounds[0][arguments.processes[0]]
    }
    print(f"{'':24}{'processes':>10}  seconds (least to most)      times as fast")
    for name, times in found.items():
        base = statistics.median(times[arguments.processes[0]])
        for count, values in times.items():
            middle = statistics.median(values)
            spread = f"{middle:.3f} ({min(values):.3f} to {max(values):.3f})"
            print(f"{name:24}{count:10}  {spread:28} {base / middle:.2f}")
    machine = {"torch": torch.__version__, "machine": platform.machine(), "cores": os.cpu_count()}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "scaling.json").write_text(
        json.dumps({**machine, "seconds": found}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
