"""Writes docs/benchmarks.md from the JSON files under benchmarks/results.

python benchmarks/tables.py
"""

import json
import statistics
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

INTRODUCTION = """# Benchmarks

Written by `python benchmarks/tables.py` from the files under `benchmarks/results`; do not edit.
Accuracies are top-1 in percent at the *last* step; test images never select anything. The even
half of the test images is the one that design choices may look at, the odd half is not.
"""

READING = """
2,000 steps are a fortieth of the published run. With the published learning rate (1e-4, cut tenfold
at a quarter, a half and three quarters) the 1,500 updates that follow the warm-up move the student
little: most of the accuracy is that of the ranges, and ranges from images optimised for a minute
(`zeroq`) are better than those from a generator that has seen 500 steps. The same tuning on 1,024 real
images (`real`) ends where `zeroq` starts, so at this length it is the schedule that limits, not the
images. The full 80,000 steps have
not been run here: at the speed below they take about a day and a half on two cores.
"""

PUBLISHED = """
Published, on another network (FP 94.03 %, track T1, W4A4, best test epoch): GDFQ after 80,000
steps 90.25, drop 3.78; ZeroQ calibrated only 79.30, drop 14.7; fine-tuning on real data 93.11
(recalled, unverified). Drops on different networks prove little: they are here for orientation.
"""


def accuracy_tables() -> str:
    runs = defaultdict(list)
    for path in sorted(RESULTS.glob("*-s*.json")):
        run = json.loads(path.read_text())
        runs[run["network"], run["bits"], run["placement"], run["recipe"], run["steps"]].append(run)
    lines = [
        "\n## Accuracy\n",
        "| network | bits | placement | recipe | steps | images drawn | seeds | full precision | all 10,000 "
        "| even / odd half | drop | seconds (CPU seconds) | peak MiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (network, bits, placement, recipe, steps), group in runs.items():
        top1 = [run["student"]["all"] for run in group]
        spread = f" ± {statistics.stdev(top1):.2f}" if len(top1) > 1 else ""
        first = group[0]
        mean = statistics.mean(top1)
        even, odd = (
            statistics.mean(run["student"][half] for run in group) for half in ("even", "odd")
        )
        seconds = statistics.mean(run["seconds"] for run in group)
        cpu = statistics.mean(run["cpu_seconds"] for run in group)
        lines.append(
            f"| {network} | {bits} | {placement} | `{recipe}` | {steps} | {first['images']:,} | {len(group)} "
            f"| {first['teacher']['all']:.2f} | {mean:.2f}{spread} | {even:.2f} / {odd:.2f} "
            f"| {first['teacher']['all'] - mean:.2f} | {seconds:.0f} ({cpu:.0f}) | {first['peak_mib']} |"
        )
    lines.append(
        "\nMade by `OMP_NUM_THREADS=1 python benchmarks/accuracy.py --recipes RECIPE --steps STEPS` "
        "(`zeroq`: without `--steps`). `real` draws its batches from 1,024 real training images. "
        "One seed where no spread is given. Runs shared a busy two-core machine, one thread each: "
        "take times from the speed table."
    )
    lines += [READING, PUBLISHED]
    for (network, bits, placement, recipe, _), group in runs.items():
        for run in group:
            if run["along"]:
                lines.append(
                    f"\n### Along the way: {network} {bits} {placement} `{recipe}`, seed {run['seed']}\n\n"
                    "| step | seconds | top-1 (measured, never used) |\n| --- | --- | --- |"
                )
                lines += [
                    f"| {p['step']} | {p['seconds']:.0f} | {p['top1']['all']:.2f} |"
                    for p in run["along"]
                ]
                lines.append(
                    f"| {run['steps']} | {run['seconds']:.0f} | {run['student']['all']:.2f} |"
                )
    return "\n".join(lines) + "\n"


def speed_table() -> str:
    path = RESULTS / "speed.json"
    if not path.exists():
        return ""
    speed = json.loads(path.read_text())
    lines = [
        "\n## Speed\n",
        f"`python benchmarks/speed.py`: CIFAR-10 ResNet-20, batch {speed['batch']}, {speed['threads']} threads, "
        f"torch {speed['torch']}, median of {speed['rounds']} rounds [fastest, slowest], all in one process in turn.\n",
        "| part | ms |",
        "| --- | --- |",
    ]
    lines += [
        f"| {name} | {speed['median_ms'][name]:.0f} [{min(ms):.0f}, {max(ms):.0f}] |"
        for name, ms in speed["ms"].items()
    ]
    lines += [
        f"\nThe batch-norm statistics cost {100 * speed['statistics_share']:.0f} % of the teacher's own forward and "
        f"backward (median of the rounds' ratios). Peak memory of the process: {speed['peak_mib']:.0f} MiB.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    target = ROOT / "docs" / "benchmarks.md"
    target.write_text(INTRODUCTION + accuracy_tables() + speed_table())
    print(f"wrote {target.relative_to(ROOT)}")
