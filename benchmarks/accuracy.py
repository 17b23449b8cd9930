"""Accuracy of recipes on the real networks of ../shared, row by row.

    python benchmarks/accuracy.py --recipes round zeroq paper real --steps 2000 --seeds 0

Each row (network, widths, recipe, steps, seed) becomes a JSON file under benchmarks/results as
soon as it is done, and is skipped when it is there, so an interrupted run goes on.
Accuracy along the way is measured and recorded; nothing is ever selected by it.
"""

import argparse
import json
import resource
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from networks import (
    cifar10_resnet20,
    cifar10_resnet32,
    cifar100_resnet56,
    imagenet_mobilenetv1_025,
)

from gdfq.capture import capture
from gdfq.data import ArrayData, Preprocessing, load_data
from gdfq.evaluate import logits_of
from gdfq.freeze import freeze
from gdfq.grid import Bits
from gdfq.models import load_weights_
from gdfq.progress import Terminal
from gdfq.recipes import find_recipe
from gdfq.sources import Batch
from gdfq.sources.images import ImageSource
from gdfq.student import Scheme, Student, build_student
from gdfq.tuning.calibrate import calibrate_
from gdfq.tuning.distill import tune_

SHARED = Path(__file__).resolve().parents[2] / "shared"
RESULTS = Path(__file__).parent / "results"
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
NETWORKS = {
    # name: (factory, input, mean and std, test data, training data)
    "cifar10_resnet20": (cifar10_resnet20, (3, 32, 32), IMAGENET, "cifar10_test.npz", "cifar10_train5k.npz"),
    "cifar10_resnet32": (cifar10_resnet32, (3, 32, 32), IMAGENET, "cifar10_test.npz", "cifar10_train5k.npz"),
    "cifar100_resnet56": (
        cifar100_resnet56, (3, 32, 32), ((0.5,) * 3, (0.5,) * 3), "cifar100_test.npz", "cifar100_train5k.npz",
    ),
    "imagenet_mobilenetv1_025": (imagenet_mobilenetv1_025, (3, 224, 224), IMAGENET, "imagenet_1000", None),
}  # fmt: skip
REAL_IMAGES = 1024


def run_row(network: str, bits: str, recipe_name: str, steps: int | None, seed: int) -> dict:
    factory, shape, (mean, std), test_file, train_file = NETWORKS[network]
    model = factory().eval()
    load_weights_(model, SHARED / "models" / f"{network}.safetensors")
    recipe = find_recipe(recipe_name).with_steps(steps)
    preprocessing = Preprocessing(mean, std)
    started, started_cpu, excluded = time.perf_counter(), time.process_time(), [0.0, 0.0]
    teacher = capture(model, torch.zeros(1, *shape))
    test = load_data(SHARED / "data" / test_file, shape, teacher.classes)
    cpu = torch.device("cpu")

    def accuracy(module) -> dict[str, float]:
        begun, begun_cpu = time.perf_counter(), time.process_time()
        right = logits_of(module, test, preprocessing, device=cpu).argmax(1) == test.labels
        excluded[0] += time.perf_counter() - begun
        excluded[1] += time.process_time() - begun_cpu
        parts = {"all": right, "even": right[::2], "odd": right[1::2]}
        return {name: round(100 * float(part.double().mean()), 3) for name, part in parts.items()}

    source = recipe.source
    if recipe_name == "real":
        train = load_data(SHARED / "data" / train_file, shape, teacher.classes)
        few = ArrayData(train.images(torch.arange(REAL_IMAGES)), train.labels[:REAL_IMAGES])
        source = ImageSource(few, preprocessing, source.batch)
    teacher_accuracy = accuracy(teacher.network)
    with Terminal() as listener:
        batches = source.stream(teacher, steps=recipe.steps, seed=seed, listener=listener)
        scheme = Scheme(Bits.parse(bits), recipe.placement)
        fixed = recipe.tuning is None or recipe.tuning.fixed_statistics
        student = build_student(teacher, scheme, fixed_statistics=fixed)
        first = islice(batches, recipe.calibration)
        calibrate_(student, first, steps=recipe.calibration, listener=listener)
        along: list[dict] = []

        def watched(batches: Iterator[Batch], student: Student) -> Iterator[Batch]:
            marks = {round(recipe.steps * i / 8) for i in range(9)} | {recipe.warmup}
            for step, batch in enumerate(batches, start=recipe.warmup):
                if step in marks:
                    seconds = time.perf_counter() - started - excluded[0]
                    student.eval()
                    along.append(
                        {
                            "step": step,
                            "seconds": round(seconds, 1),
                            "top1": accuracy(freeze(student)),
                        }
                    )
                    student.train()
                yield batch

        if recipe.tuning is not None:
            for _ in islice(batches, recipe.warmup - recipe.calibration):
                pass
            tune_(
                student, watched(batches, student), recipe.tuning,
                first_step=recipe.warmup, total_steps=recipe.steps, listener=listener,
            )  # fmt: skip
        frozen = freeze(student)
    seconds = time.perf_counter() - started - excluded[0]
    cpu_seconds = time.process_time() - started_cpu - excluded[1]
    return {
        "network": network, "bits": bits, "placement": recipe.placement, "recipe": recipe_name,
        "steps": recipe.steps, "seed": seed, "images": recipe.steps * source.batch,
        "teacher": teacher_accuracy, "student": accuracy(frozen), "along": along,
        "seconds": round(seconds, 1), "cpu_seconds": round(cpu_seconds, 1),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", default=["cifar10_resnet20"], choices=NETWORKS)
    parser.add_argument("--bits", nargs="+", default=["w4a4"])
    parser.add_argument("--recipes", nargs="+", default=["round", "zeroq", "paper", "real"])
    parser.add_argument("--steps", type=int, help="the recipe's own by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    if not SHARED.is_dir():
        sys.exit(f"skipped: the networks and images of {SHARED} are not there")
    RESULTS.mkdir(exist_ok=True)
    rows = [
        (network, bits, recipe, options.steps, seed)
        for network in options.networks
        for bits in options.bits
        for recipe in options.recipes
        for seed in options.seeds
    ]
    for row in rows:
        steps = f"-{row[3]}" if row[3] else ""
        path = RESULTS / f"{row[0]}-{row[1]}-{row[2]}{steps}-s{row[4]}.json"
        if not path.exists():
            path.write_text(json.dumps(run_row(*row), indent=1) + "\n")
        result = json.loads(path.read_text())
        print(
            path.stem,
            result["teacher"]["all"],
            result["student"]["all"],
            f"{result['seconds']} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
