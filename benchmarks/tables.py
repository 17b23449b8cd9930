"""Writes docs/benchmarks.md from the JSON files under benchmarks/results.

python -m benchmarks.tables
"""

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import paired, peers_224, step_speed
from benchmarks.accuracy import PLAN, Row, settings_of
from support.places import RESULTS, ROOT

from gdfq.recipes import find_recipe

PAGE = ROOT / "docs" / "benchmarks.md"

INTRODUCTION = """# Benchmarks

`python -m benchmarks.tables` writes this page from the files under `benchmarks/results`; do not edit it.
Accuracies are top-1 in percent at the *last* step; no run selects anything by accuracy. The design of `fast` looked at
the even half of the test images of the development networks ([research](research/index.md)), and never at the odd half.
"""

READING = """
*Development networks* are marked with an asterisk: hyper-parameters were chosen on their even-indexed images (with seed
100), so read the odd half. ResNet-56 showed mistakes of the images, and MobileNetV1 (both with seed 100) showed how many images of how
many iterations it needs, when not to shift them, that equalizing channels helps, and that images should be optimised
further ([research](research/index.md)). `fast` is one recipe for all networks, but MobileNetV1 does not confirm it independently.

Seconds are of the whole run, from capture to the frozen student, on one thread of a machine whose other core was also busy: with both
cores a run takes little more than half as long. The time of the images is charged to every row that uses
them. The load differed, and so did the machines: seeds of one row differ by a factor of up to three, so the fastest one stands here. A
*float step* is a plain training step of the same network on the row's own batch (100 for `mct`), measured in the same
process (batch norms in evaluation form). Peak memory is that of the process.

Rows of the ResNets in placement `full` are from before weights were [rounded for the outputs](research/round-17-rounding.md) (`fast` on ResNet-20, seed 0, measured again: 89.63 % for 89.73 at w3a3, 83.17 for 83.98 at
w2a2), and in those of ResNet-56 two [narrow layers](research/round-18-narrow-layers.md) have the bits of the others (at w4a4 no difference). At w2a2 the first and the last layer have 8 bits, and in the row of MobileNetV1
narrow layers have 8; both have [7 now](research/round-20-seven-bits.md).

Some seeds were run on a GPU (an H200, torch 2.11, up to 15 rows at a time), which the files under `benchmarks/results` say;
seconds and peak memory (that of the process, not of the GPU) are of seeds on the CPU where there are any, and marked with ‡ where all ran on the GPU. In all of these but
`paper` and `real` of ResNet-56 at w2a2, the GPU computed convolutions in TF32, PyTorch's default, which
rounds their factors to 11 bits. Runs turn that off now. ResNet-20 at w3a3, seed 0, had 89.73 % on the CPU and 89.76 % on the GPU in this
way (before weights were rounded for the outputs).

`genie` and `synq` are those methods built from the pieces of this package and cut to about 6 minutes on one thread,
far less than their published schedules (`synq` without its activation maps). `mct` is Sony's
model-compression-toolkit 2.6.1 with its own generated images and gradient-based quantization: 512 images of 200
iterations and 40 epochs (its "steps"), chosen here to fit the time; the rest are its defaults.
"""

PAPER_READING = """
`paper` at 10,000 steps is an eighth of the published 80,000, with its schedule scaled to that length. With the published learning rate
(1e-4, cut tenfold at a quarter, a half and three quarters) the updates after the warm-up move the student little: at this length
the schedule is the limit, not the images. At the speed of this row all 80,000 steps take three quarters of an hour on an H200, and days on two cores.
"""

PUBLISHED = """
Published drops, on *other* networks (the same placement as `relu`, best test epoch): CIFAR-10 ResNet-20
w4a4: GDFQ 3.78 (of 94.03), SynQ 1.13 (of 93.89); w3a3: HAST 5.55 (of 93.89). CIFAR-100
ResNet-20 (70.33) w4a4: SynQ 2.99; w3a3: SynQ 13.05. ImageNet MobileNetV1 (73.39) w4a4: PLF 15.69.
Drops on different networks prove little; they are here for orientation.
"""

DEVELOPMENT = {"cifar10_resnet20", "cifar10_resnet32"}


def is_stale(run: dict[str, Any]) -> bool:
    """Whether another form of the recipe made the row."""
    row = Row(*(run[name] for name in ("network", "bits", "placement", "recipe", "seed", "steps")))
    own = settings_of(replace(row, steps=None))  # where the widths decide how many steps there are
    return run.get("settings") not in {settings_of(row), own}


def is_missing(row: Row) -> bool:
    """Whether a row of the plan has not been run with the present recipe."""
    return not row.path.exists() or json.loads(row.path.read_text()).get("settings") != settings_of(
        row
    )


def on_one_thread(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those whose times are comparable; all if none is."""
    on_cpu = [run for run in runs if not is_of_gpu(run)] or runs
    return [run for run in on_cpu if run.get("threads", 1) == 1] or on_cpu


def is_of_gpu(run: dict[str, Any]) -> bool:
    """Whether a row was measured on a GPU."""
    return bool(run.get("device", "cpu") != "cpu")


def least_disturbed(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The fastest one: whatever else a machine does can only add time."""
    return min(on_one_thread(runs), key=lambda run: run["seconds"]["total"])


def dropped(run: dict[str, Any], half: str) -> float:
    """The points of a run below its own teacher, as the device of the run computed both."""
    return float(run["teacher"][half] - run["student"][half])


def on_two_threads(runs: list[dict[str, Any]]) -> str:
    """What the other runs of present recipes took."""
    runs_of_two = [
        f"{run['network']} {run['placement']} {run['bits']} `{run['recipe']}` of seed {run['seed']} "
        f"{run['seconds']['total']:.0f} s"
        for run in runs
        if run.get("threads", 1) == 2 and not is_stale(run)
    ]
    return f"\nWith two threads: {'; '.join(runs_of_two)}." if runs_of_two else ""


def accuracy_tables() -> str:
    runs = defaultdict(list)
    for path in sorted(RESULTS.glob("*-s*.json")):
        run = json.loads(path.read_text())
        name = f"`{run['recipe']}`{'†' * is_stale(run)}"
        what = (run["network"], run["placement"], run["bits"], name, run["steps"])
        runs[(*what, run.get("settings"))].append(run)  # no mean over two forms of a recipe
    lines = [
        "\n## Accuracy\n",
        "| network | placement | bits | recipe | steps | seeds | full precision | top-1, all images "
        "| even / odd half | drop, all (95 % interval) | drop, odd half | agreement with the teacher "
        "| seconds (images) | float steps | peak MiB |",
        "| --- |" + " --- |" * 14,
    ]
    for (network, placement, bits, recipe, steps, _), group in runs.items():
        top1 = [run["student"]["all"] for run in group]
        spread = f" ± {statistics.stdev(top1):.2f}" if len(top1) > 1 else ""
        full = group[0]["teacher"]

        def mean(
            of: Callable[[dict[str, Any]], float], group: list[dict[str, Any]] = group
        ) -> float:
            return statistics.mean(of(run) for run in group)

        fastest = least_disturbed(group)

        odd = mean(lambda run: run["student"]["odd"])
        even = mean(lambda run: run["student"]["even"])
        interval, agreement, cost, images = "", "", "", ""
        if "drop_interval" in group[0]:
            low = mean(lambda run: run["drop_interval"][0])
            high = mean(lambda run: run["drop_interval"][1])
            interval = f" ({low:.2f} to {high:.2f})"
            agreement = f"{mean(lambda run: run['agreement']):.2f}"
            cost = "" if is_of_gpu(fastest) else f"{fastest['float_steps']:,.0f}"
            images = f" ({fastest['seconds']['images']:.0f}){'‡' * is_of_gpu(fastest)}"
        star = "\\*" if network in DEVELOPMENT else ""
        lines.append(
            f"| {network}{star} | {placement} | {bits} | {recipe} | {steps:,} | {len(group)} "
            f"| {full['all']:.2f} | {statistics.mean(top1):.2f}{spread} | {even:.2f} / {odd:.2f} "
            f"| {mean(partial(dropped, half='all')):.2f}{interval} | {mean(partial(dropped, half='odd')):.2f} "
            f"| {agreement} | {fastest['seconds']['total']:.0f}{images} | {cost} "
            f"| {max(run['peak_mib'] for run in on_one_thread(group))} |"
        )
    missing: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for row in filter(is_missing, PLAN):
        steps = f", {row.steps} steps" if row.steps else ""
        title = f"`{row.recipe}`{steps}, placement {row.placement}"
        missing[title][f"{row.network} {row.bits}"].append(str(row.seed))
    if missing:
        lines.append("\nPlanned rows that have not been measured (seeds in brackets):\n")
    for title, rows in missing.items():
        listed = ", ".join(f"{name} ({', '.join(seeds)})" for name, seeds in rows.items())
        lines.append(f"- {title}: {listed}")
    lines.append(
        "\nMade by `OMP_NUM_THREADS=1 python -m benchmarks.accuracy`, row by row; `real` is "
        "`fast`'s tuning on 1,024 real training images. ± is the standard deviation over seeds; "
        "the interval is the paired bootstrap over test images, its bounds averaged over seeds. "
        "Seconds and float steps are of the fastest seed, of those on one thread where there are any."
    )
    lines.append(on_two_threads([run for group in runs.values() for run in group]))
    lines += [READING, PAPER_READING, PUBLISHED]
    for (network, placement, bits, recipe, *_), group in runs.items():
        for run in group:
            if run.get("along"):
                lines.append(
                    f"\n### Accuracy during the run: {network} {bits} {placement} {recipe}, seed {run['seed']}\n\n"
                    "| step | seconds | top-1 (measured, never used) |\n| --- | --- | --- |"
                )
                lines += [
                    f"| {p['step']} | {p['seconds']:.0f} | {p['top1']['all']:.2f} |"
                    for p in run["along"]
                ]
                total = run["seconds"]["total"]
                lines.append(f"| {run['steps']} | {total:.0f} | {run['student']['all']:.2f} |")
    return "\n".join(lines) + "\n"


def seconds_of(run: dict[str, Any]) -> str:
    """The seconds of a run, marked if a GPU computed it."""
    return f"{run['seconds']['total']:.0f}{'‡' * is_of_gpu(run)}"


def rival_table() -> str:
    """`fast` against other recipes, image by image; rows that kept which images were right."""
    runs = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*-s*.json"))]
    kept = [run for run in runs if "right" in run and not is_stale(run)]
    lines = [
        "\n## `fast` compared with the others, image by image\n",
        "Points by which `fast` is correct on more of the same test images than the other recipe with the same "
        "seed, and their paired 95 % bootstrap interval over test images (not over seeds), for the rows that recorded "
        "which images were correct.\n",
        "| network | placement | bits | seed | other recipe, steps | `fast` better by, all images | odd half "
        "| seconds: `fast`, other |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    heading = len(lines)
    where = ("network", "placement", "bits", "seed")
    for fast in kept:
        if fast["recipe"] != "fast" or fast["steps"] != find_recipe("fast").steps:
            continue
        for other in kept:
            if other is fast or any(fast[name] != other[name] for name in where):
                continue
            count = fast["images_tested"]
            gain = paired.unpacked(fast["right"], count).double()
            gain -= paired.unpacked(other["right"], count).double()
            cells = []
            for part in (gain, gain[1::2]):
                low, high = paired.interval(part)
                cells.append(f"{100 * float(part.mean()):.2f} ({low:.2f} to {high:.2f})")
            lines.append(
                f"| {' | '.join(str(fast[name]) for name in where)} | `{other['recipe']}`, {other['steps']:,} "
                f"| {' | '.join(cells)} "
                f"| {', '.join(map(seconds_of, (fast, other)))} |"
            )
    if len(lines) == heading:
        lines.append("\nNo row of the present `fast` is there yet.")
    return "\n".join(lines) + "\n"


def time_table() -> str:
    """Accuracy over time of all recipes on one network, the quickest first."""
    runs = defaultdict(list)
    for path in RESULTS.glob("cifar10_resnet20-w3a3-full-*-s*.json"):
        run = json.loads(path.read_text())
        if "float_steps" in run and not is_of_gpu(run):
            runs[run["recipe"], run["steps"], run.get("settings")].append(run)
    if len(runs) < 2:
        return ""  # times of different devices say nothing about each other
    rows = sorted(
        (
            least_disturbed(group)["seconds"]["total"],
            least_disturbed(group)["float_steps"],
            statistics.mean(run["student"]["all"] for run in group),
            f"`{recipe}`{'†' * is_stale(group[0])}",
            steps,
        )
        for (recipe, steps, _), group in runs.items()
    )
    lines = [
        "\n## Accuracy over time\n",
        "CIFAR-10 ResNet-20, w3a3, full: each point is a separate run (or the mean of its seeds) with its "
        "schedule scaled to its length. The whole time of the fastest seed counts, images included. A float step is of the row's "
        "own batch (64 of `fast`, 100 of `quick`), so compare float steps of equal batches only.\n",
        "| seconds | float steps | recipe, steps | top-1 |",
        "| --- | --- | --- | --- |",
    ]
    lines += [
        f"| {seconds:.0f} | {cost:,.0f} | {recipe}, {steps:,} | {top1:.2f} |"
        for seconds, cost, top1, recipe, steps in rows
    ]
    return "\n".join(lines) + "\n"


RUNTIME = """
## Exported files

`python -m benchmarks.runtime make`, then `measure`: placement `full`, recipe `quick` of earlier versions: MobileNetV1 at w4a4, then with 4 bits in narrow layers, has 23.6 %
instead of the README's 48.0, and `quantize_static` there, on the images of that version, 25.7 % (48 to 50 % in the tables below); others differ a little. The times of ResNet-20 and ResNet-56 with two threads say nothing: other work used the two cores. All files of a network are
timed in turn in one process of ONNX Runtime 1.32 on a CPU with VNNI, 1.5 seconds for each file and setting. Times are
median [first, third quartile] milliseconds per call. `quantize_static` is ONNX Runtime's own quantization of the same
float32 file with the same images (uint8 activations, int8 weights per channel, QDQ). Parity is the agreement of
the file with the simulation on all test images. ResNet-18 has random weights. *Stem kept* means
`--layer-bits stage1.0.0=float --layer-bits stage1.1.0=float`: the layers of 3 and 8 channels stay float.

Where the time goes (medians of ONNX Runtime's own profile, microseconds, with other work on the machine): the first two
layers of MobileNetV1 have 3 and 8 channels, for which there is no fast integer kernel. They take 335 and 233 of 1,352,
against 111 and 49 in float, whose kernel works on 16 channels at once. If they stay float, with nothing quantized between them,
the file is faster than float32. ResNet-18 spends 6,400 of 6,900 in QLinearConv, 1,150 of them in the first layer (3
channels), as the file of `quantize_static` does: the kernels decide its time, not the graph around them.

w4a4 is a few percent slower than w4a8: codes of 4 bits need a `Clip` behind each layer, and tensors that enter layers and sums
are rounded again for the layers. What the forms of this rounding cost on ResNet-20 at w4a4 (batch 1, one thread, in turn
in one process; all give the same outputs):

| what rounds again | latency |
| --- | --- |
| nothing (sums are carried in 4 bits, as in an earlier version; other outputs) | 0.92 |
| `QuantizeLinear`, `Clip` (three nodes in the runtime, the first a `DequantizeLinear`) | 1.00 |
| `QuantizeLinear` with codes that end at 255, without `Clip` | 0.98 |
| `Mul` by 1 and `QuantizeLinear`, codes that end at 255 (`QLinearMul`) | 0.98 |
| `LeakyRelu` with slope 1 and `QuantizeLinear`, codes that end at 255 (a table of 256 codes) | 1.01 |
| `AveragePool` of one pixel and `QuantizeLinear`, codes that end at 255 (`QLinearAveragePool`; busy machine) | 1.47 |
| **`Add` of 0 and `QuantizeLinear`, codes that end at 255 (`QLinearAdd`): what files have** | **0.94** |
"""


WITHOUT_VNNI = """
The same on an older processor (AVX2, no VNNI; nothing else ran). 8-bit products are slower there, and their sums
saturate, which files of 8-bit weights show in top-1 and parity. So do w4a8 and w4a4 here, whose [narrow layers](research/round-18-narrow-layers.md) had 8 bits then;
with [their 7 bits of now](research/round-20-seven-bits.md) no sum saturates.
[Export](export.md#x86-processors-without-vnni) names three ways out:
"""


def runtime_tables() -> str:
    files = {"runtime.json": RUNTIME, "runtime-no-vnni.json": WITHOUT_VNNI}
    return "".join(runtime_table(RESULTS / name, text) for name, text in files.items())


def runtime_table(path: Path, text: str) -> str:
    if not path.exists():
        return ""
    rows = json.loads(path.read_text())
    settings = [(t["batch"], t["threads"]) for t in rows[0]["timings"]]
    heads = [f"batch {batch}, {threads} thread{'s' * (threads > 1)}" for batch, threads in settings]
    lines = [
        text,
        f"| network | file | KiB | smaller | {' | '.join(heads)} | faster (first setting) | top-1 "
        "| parity: same predictions, top-1 of the simulation | OpenVINO ms, same predictions as ONNX Runtime |",
        "| --- |" + " --- |" * (7 + len(heads)),
    ]
    full: dict[str, Any] = {}
    for row in rows:
        full = row if row["file"] == "float32" else full
        times = [f"{t['median']:.2f} [{t['low']:.2f}, {t['high']:.2f}]" for t in row["timings"]]
        faster = full["timings"][0]["median"] / row["timings"][0]["median"]
        top1 = f"{row['top1']:.2f}" if "top1" in row else ""
        parity = (
            f"{row['agreement']:.2f} %, {row['simulated_top1']:.2f}" if "agreement" in row else ""
        )
        other = (
            f"{row['openvino_ms']:.2f}, {row['openvino_agreement']:.0f} %"
            if "openvino_ms" in row
            else ""
        )
        lines.append(
            f"| {row['network']} | {row['file']} | {row['bytes'] / 1024:.0f} "
            f"| {full['bytes'] / row['bytes']:.2f}x | {' | '.join(times)} | {faster:.2f}x | {top1} "
            f"| {parity} | {other} |"
        )
    return "\n".join(lines) + "\n"


def peers_table() -> str:
    if not peers_224.FILE.exists():
        return ""
    return peers_224.table(json.loads(peers_224.FILE.read_text()))


def speed_table() -> str:
    path = RESULTS / "speed.json"
    if not path.exists():
        return ""
    speed = json.loads(path.read_text())
    lines = [
        "\n## Speed\n",
        f"`python -m benchmarks.speed`: CIFAR-10 ResNet-20, batch {speed['batch']}, {speed['threads']} threads, "
        f"torch {speed['torch']}, median of {speed['rounds']} rounds [fastest, slowest], all in one process in turn.\n",
        "| part | ms |",
        "| --- | --- |",
    ]
    lines += [
        f"| {name} | {speed['median_ms'][name]:.0f} [{min(ms):.0f}, {max(ms):.0f}] |"
        for name, ms in speed["ms"].items()
    ]
    lines += [
        "\nMeasured before convolutions of fixed weights kept no input. "
        f"The batch-norm statistics cost {100 * speed['statistics_share']:.0f} % of the teacher's own forward and "
        f"backward (median of the rounds' ratios). Peak memory of the process: {speed['peak_mib']:.0f} MiB.",
    ]
    return "\n".join(lines) + "\n"


SCALE = """
## Scale

`python -m benchmarks.speed --scale`: random weights, {batch} images of 224x224, one thread, float32, torch
{torch}, on a machine that was busy with other work: read the ratios and their spread. *Float* is a plain training step
of the user's own eager module (training mode, cross-entropy, backward, Adam; nothing of gdfq). *Student* is the same
step of the captured student alone (w4a4, `full`, learned grids, batch norms folded), all images at once. *Parts* is the
student's step as tuning always runs it, with large images in parts. *Tuning* is a whole step of `fast`, also in parts:
the student, the teacher without gradient, and the losses of features and outputs. The last two are one call of the tuning
for each step, so their set-up is included.

Seconds are medians of {rounds} rounds, the four in turn in one process. MiB are the bytes of the networks' tensors + the rise of
the peak of a separate child process over two steps (activations, gradients, the state of the optimizer).
"""
TO_FLOAT = """
The same as multiples of the float step. Times: the median of the rounds' ratios [least, greatest]; the limit for the
student is 1.6. Memory: the sums, in brackets the rises alone; the limit for the student is 2.
"""
SCALE_READING = """
ViT-S with all images at once exceeds the limit for memory. Attention is two products in the student, so that softmax can
be quantized; the fused attention of the float step never stores the scores. And each quantized tensor is stored twice for
the backward pass, before its quantizer (for the gradient of the scale) and after it (by the next layer). After a ReLU this
costs nothing, because a ReLU stores its output anyway, but GELU, LayerNorm and linear layers do not store their
outputs. In parts the student's step is below the limit; with the teacher the whole tuning step is just above it. Times of
ViT-S in single rounds exceed 1.6, too.

For these rows the search for the student's first grids, which no step repeats, was cut to its first candidate. An
earlier run with the whole search, of all but ResNet-50, gave the student 1.11 to 1.32 in time and 1.07 to 2.69 in
memory; peaks of the same step differed by up to 13 % between the runs.
"""
STEPS = ("float", "student", "parts", "tuning")


def scale_table() -> str:
    path = RESULTS / "scale.json"
    if not path.exists():
        return ""
    scale = json.loads(path.read_text())
    first = [
        f"| network | parameters | {' | '.join(f'{step}, s' for step in STEPS)} "
        f"| {' | '.join(f'{step}, MiB' for step in STEPS)} |",
        "| --- |" + " --- |" * (1 + 2 * len(STEPS)),
    ]
    second = [
        f"| network | {' | '.join(f'{step}, time' for step in STEPS[1:])} "
        f"| {' | '.join(f'{step}, memory' for step in STEPS[1:])} |",
        "| --- |" + " --- |" * (2 * len(STEPS) - 2),
    ]
    for network, row in scale["networks"].items():
        ms, held, rise = row["ms"], row["tensors_mib"], row["step_mib"]
        cells = [f"{statistics.median(ms[step]) / 1000:.1f}" for step in STEPS]
        cells += [f"{held[step]:.0f} + {rise[step]:.0f}" for step in STEPS]
        first.append(f"| {network} | {row['parameters'] / 1e6:.1f} M | {' | '.join(cells)} |")
        cells = []
        for step in STEPS[1:]:
            ratios = [a / b for a, b in zip(ms[step], ms["float"], strict=True)]
            cells.append(f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]")
        for step in STEPS[1:]:
            whole = (held[step] + rise[step]) / (held["float"] + rise["float"])
            cells.append(f"{whole:.2f} ({rise[step] / rise['float']:.2f})")
        second.append(f"| {network} | {' | '.join(cells)} |")
    return "\n".join([SCALE.format_map(scale), *first, TO_FLOAT, *second, SCALE_READING])


def step_speed_table() -> str:
    if not step_speed.FILE.exists():
        return ""
    return step_speed.table(json.loads(step_speed.FILE.read_text()))


def page() -> str:
    """The whole of docs/benchmarks.md."""
    return (
        INTRODUCTION
        + accuracy_tables()
        + rival_table()
        + time_table()
        + runtime_tables()
        + peers_table()
        + speed_table()
        + scale_table()
        + step_speed_table()
    )


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    PAGE.write_text(page())
    print(f"wrote {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
