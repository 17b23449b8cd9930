"""Accuracy of recipes on the real networks of ../shared, row by row.

    python -m benchmarks.accuracy                        # every row of PLAN that is not there yet
    python -m benchmarks.accuracy --recipes fast --bits w3a3 --seeds 0 1 2

Each row (network, widths, placement, recipe, seed) becomes a JSON file under benchmarks/results
as soon as it is done, and is skipped when it is there and the recipe is still the same. A row that
was interrupted resumes from its checkpoint under benchmarks/cache. The images of a pool do not
depend on the student: they are made once for each network and seed, kept under benchmarks/cache,
and their time is charged to every row that uses them. No run selects anything by accuracy.
"""

import argparse
import copy
import hashlib
import json
import re
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks import paired, peer
from benchmarks.trained_networks import EFFICIENTNET, MOBILE, NETWORKS, R20, R32, R56, Network
from benchmarks.unix import peak_resident_mib
from safetensors.torch import load_file, save_file
from support.narrowing import present
from support.places import CACHE, RESULTS, SHARED
from torch import Tensor

import gdfq
from gdfq import pipeline
from gdfq.analysis.accuracy import logits_of
from gdfq.data.datasets import ArrayData, load_data
from gdfq.data.preprocessing import Preprocessing
from gdfq.execution.checkpoints import Checkpoints
from gdfq.execution.context import Context
from gdfq.execution.listeners import Terminal
from gdfq.execution.malloc import keep_freed_memory_
from gdfq.execution.precision import in_full_float32
from gdfq.files.plain_values import fingerprint
from gdfq.functional.grid import Bits
from gdfq.graph.capture import Captured, capture
from gdfq.plan.method import resolve_method
from gdfq.plan.resolve import resolve
from gdfq.recipes import Recipe
from gdfq.sources.given import GivenImages
from gdfq.sources.pool import ImagePool, StoredImages, collect

REAL_IMAGES = 1024
PEER = "mct"
IMAGE_CODE = (
    "functional/losses.py",
    "functional/moments.py",
    "graph/statistics.py",
    "optim.py",
    "execution/seeding.py",
)
"""What images depend on besides the sources themselves."""
Module = Callable[[Tensor], Tensor]
Facts = dict[str, Any]


@dataclass(frozen=True)
class Row:
    network: str
    bits: str
    placement: str
    recipe: str
    seed: int
    steps: int | None = None
    """The recipe's own if None."""

    @property
    def path(self) -> Path:
        parts = [self.network, self.bits, self.placement, self.recipe, f"s{self.seed}"]
        parts += [] if self.steps is None else [str(self.steps)]
        return RESULTS / ("-".join(parts) + ".json")


def stored(recipe: Recipe, teacher: Captured, row: Row, listener: Terminal) -> tuple[Recipe, float]:
    """The recipe with the images of its pool made once for all rows of a network and seed.

    With it come the seconds that making them took.
    """
    pool = recipe.source
    if not isinstance(pool, ImagePool) or isinstance(pool.source, GivenImages):
        return recipe, 0.0
    CACHE.mkdir(exist_ok=True)
    kind = type(pool.source).__name__.lower()
    path = CACHE / f"{row.network}-{kind}-{pool.images}-s{row.seed}.safetensors"
    settings = path.with_suffix(".txt")
    # Other images come of other settings, and of other code.
    code = hash_of("sources/*.py", *IMAGE_CODE)
    made_by = f"{fingerprint(pool.source)} {code} {teacher.device.type}"
    if not settings.exists() or settings.read_text().partition("\n")[0] != made_by:
        started = time.perf_counter()
        with in_full_float32(teacher.device):
            images, labels = collect(
                pool.source, teacher, pool.images, context=Context(seed=row.seed, listener=listener)
            )
        seconds = time.perf_counter() - started
        kept = {"images": images.contiguous().cpu(), "labels": present(labels).cpu()}
        save_file(kept, path)
        settings.write_text(f"{made_by}\n{seconds:.3f}")
    made = load_file(path, device=str(teacher.device))
    seconds = float(settings.read_text().split("\n")[1])
    images = made["images"].contiguous(memory_format=torch.channels_last)
    source = StoredImages(images, made["labels"], pool.source.batch)
    return replace(recipe, source=replace(pool, source=source)), seconds


def float_step_seconds(teacher: Captured, batch: int) -> float:
    """Median time of a plain float training step of the network on the batch."""
    network = copy.deepcopy(teacher.network).requires_grad_(True)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    images = torch.randn(batch, *teacher.input_shape, device=teacher.device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(present(teacher.classes), (batch,), device=teacher.device)
    times = []
    for _ in range(6):
        started = time.perf_counter()
        with torch.enable_grad():
            F.cross_entropy(network(images), labels).backward()
        optimizer.step()
        if teacher.device.type == "cuda":  # kernels run asynchronously
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def tested(
    student: Callable[[Tensor], Tensor],
    teacher: Captured,
    images: Path,
    preprocessing: Preprocessing,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of student and teacher on all test images, and the labels of these."""
    test = load_data(images, teacher.input_shape, teacher.classes)
    assert test.labels is not None
    student_logits, teacher_logits = (
        logits_of(module, test, preprocessing, device=teacher.device)
        for module in (student, teacher.network)
    )
    return student_logits, teacher_logits, test.labels


def compared(student: Tensor, teacher: Tensor, labels: Tensor) -> Facts:
    """Accuracies, agreement and the paired 95 % bootstrap interval of the drop, in percent.

    `right` is which images the student answered rightly: what compares it with another student.
    """
    right = student.argmax(1) == labels
    right_teacher = teacher.argmax(1) == labels
    halves = {"all": slice(None), "even": slice(0, None, 2), "odd": slice(1, None, 2)}
    low, high = paired.interval(right_teacher.double() - right.double())

    def percent(part: Tensor) -> float:
        return round(100 * float(part.double().mean()), 3)

    return {
        "teacher": {name: percent(right_teacher[half]) for name, half in halves.items()},
        "student": {name: percent(right[half]) for name, half in halves.items()},
        "agreement": percent(student.argmax(1) == teacher.argmax(1)),
        "drop_interval": [round(low, 3), round(high, 3)],
        "images_tested": len(labels),
        "right": paired.packed(right),
    }


def hash_of(*patterns: str) -> str:
    """A short name for the contents of some of the package's files."""
    package = Path(gdfq.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(path for pattern in patterns for path in package.glob(pattern)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def settings_of(row: Row) -> str:
    """A short name for all values of the row's recipe."""
    if row.recipe == PEER:
        return f"{peer.IMAGES} images, {peer.ITERATIONS} iterations, {peer.EPOCHS} epochs"
    method = resolve_method(row.bits, row.recipe, placement=row.placement, steps=row.steps)
    return fingerprint(method.recipe)


def forget_peak_() -> None:
    """Let the peak of this process's memory count from here, where the system can (Linux)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_mib() -> int:
    """The most memory that the process held since `forget_peak_`."""
    with suppress(OSError):
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        if found:
            return int(found[1]) // 1024
    return int(peak_resident_mib())


def run_row(row: Row, device: torch.device) -> dict[str, object]:
    forget_peak_()
    network = NETWORKS[row.network]
    model = network.load()
    started = time.perf_counter()
    captured = capture(model, torch.zeros(1, *network.shape)).to(device)
    teacher = replace(captured, input_limits=network.preprocessing.limits)
    seconds = {"capture": time.perf_counter() - started}
    if row.recipe == PEER:
        student, facts = run_peer(row, network, model)
        batch = 100
    else:
        student, facts, batch = run_recipe(row, network, teacher)
    seconds |= facts.pop("seconds")
    float_step = float_step_seconds(teacher, batch)
    found = tested(student, teacher, network.test, network.preprocessing)
    seconds["total"] = sum(seconds.values())
    return {
        "network": row.network, "bits": row.bits, "placement": row.placement,
        "recipe": row.recipe, "settings": settings_of(row), "code": hash_of("**/*.py"), "seed": row.seed, **facts,
        **compared(*found),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "float_step_seconds": round(float_step, 4),
        "float_steps": round(seconds["total"] / float_step),
        "peak_mib": peak_mib(),
        "device": device_name(device),
        "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip


def device_name(device: torch.device) -> str:
    """The GPU's own name, or cpu."""
    return torch.cuda.get_device_name() if device.type == "cuda" else "cpu"


def run_recipe(row: Row, network: Network, teacher: Captured) -> tuple[Module, Facts, int]:
    """The student of one of our recipes, what the run was, and the batch it tuned on."""
    few = None
    if row.recipe in {"real", "paper-real"}:
        assert network.train is not None
        train = load_data(network.train, network.shape, teacher.classes)
        first = torch.arange(REAL_IMAGES)
        few = ArrayData(train.images(first), present(train.labels)[:REAL_IMAGES])
    plan = resolve(
        teacher, None, row.bits, row.recipe, placement=row.placement, steps=row.steps, data=few,
        mean=network.preprocessing.mean, std=network.preprocessing.std,
    )  # fmt: skip
    with Terminal() as listener:
        recipe, made = stored(replace(plan.recipe, source=plan.source), teacher, row, listener)
        plan = replace(plan, recipe=recipe, source=recipe.source)
        checkpoints = Checkpoints(CACHE / f"{row.path.stem}-{settings_of(row)}-checkpoints")
        context = Context(seed=row.seed, listener=listener, checkpointer=checkpoints)
        finished = pipeline.run(plan, context)
        checkpoints.remove()
    student = finished.network
    seconds = {"images": made, "student": finished.metrics["seconds"]["total"]}
    source = recipe.source
    images = source.images if isinstance(source, ImagePool) else recipe.steps * source.batch
    return student, {"steps": recipe.steps, "images": images, "seconds": seconds}, source.batch


def run_peer(row: Row, network: Network, model: torch.nn.Module) -> tuple[Module, Facts]:
    """The student that another toolkit makes."""
    bits = Bits.parse(row.bits)
    student, seconds = peer.quantized(
        model, network.shape, bits.weights, bits.activations, row.seed
    )
    return student, {"steps": peer.EPOCHS, "images": peer.IMAGES, "seconds": seconds}


SEEDS = (0, 1, 2)
LOW_BITS = [(name, bits) for bits in ("w4a4", "w3a3", "w2a2") for name in (R20, R32, R56)]
"""Networks and widths that `fast` tunes."""
OTHERS = ("quick", "genie", "synq", "zeroq", "round")
"""Recipes that `fast` is compared with."""
PUBLISHED = ("fast", *OTHERS, "real", PEER)
"""Recipes in the placement of published tables."""
PAPER_STEPS = 10_000
"""Of `paper`, whose own 80,000 take more than a day on two cores."""
PLAN = (
    [Row(name, bits, "full", "fast", seed) for seed in SEEDS for name, bits in LOW_BITS]
    + [Row(name, "w4a4", "full", "fast", seed) for seed in SEEDS for name in (MOBILE, EFFICIENTNET)]
    + [Row(R20, "w3a3", "full", recipe, 0) for recipe in OTHERS]
    + [Row(name, bits, "full", "real", 0) for name, bits in LOW_BITS]
    + [Row(R20, bits, "relu", recipe, 0) for bits in ("w4a4", "w3a3") for recipe in PUBLISHED]
    + [Row(R20, "w4a4", "relu", "paper", 0, PAPER_STEPS)]
    + [Row(name, "w4a4", "relu", "paper", 0) for name in (R20, R56)]
)
"""All rows in the order in which they are to be measured: the deployable placement first, then
that of published tables."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", choices=NETWORKS)
    parser.add_argument("--bits", nargs="+")
    parser.add_argument("--placements", nargs="+", choices=("relu", "full"))
    parser.add_argument("--recipes", nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options = parser.parse_args()
    keep_freed_memory_()
    if not SHARED.is_dir():
        sys.exit(f"skipped: the networks and images of {SHARED} are not there")
    RESULTS.mkdir(exist_ok=True)
    chosen = [
        row
        for row in PLAN
        if all(
            wanted is None or value in wanted
            for value, wanted in (
                (row.network, options.networks), (row.bits, options.bits),
                (row.placement, options.placements), (row.recipe, options.recipes),
                (row.seed, options.seeds),
            )
        )
    ]  # fmt: skip
    if not chosen:
        sys.exit("no row of PLAN fits these options; see the end of this file for what it holds")
    for row in chosen:
        path = row.path
        result = json.loads(path.read_text()) if path.exists() else {}
        # A row that another form of the recipe made says nothing of this one.
        if result.get("settings") != settings_of(row):
            if row.recipe == PEER and (why := peer.why_absent()):
                print(f"{path.stem}: skipped, {why}", flush=True)
                continue
            result = run_row(row, torch.device(options.device))
            path.write_text(json.dumps(result, indent=1) + "\n")
        drop = result["teacher"]["all"] - result["student"]["all"]
        print(
            f"{path.stem}: {result['student']['all']:.2f} % (drop {drop:.2f}), "
            f"{result['seconds']['total']:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
