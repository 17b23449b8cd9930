"""Denoisers of diffusion models on their own trajectories: integer and floating-point grids.

    python -m benchmarks.diffusion                       # every row that is not there yet
    python -m benchmarks.diffusion --seeds 0 --bits wfp8afp8
    python -m benchmarks.diffusion --table

The network is the denoiser of digits in ../shared, with 20 steps of DDIM. 128 points of trajectories
quantize (256 tune); 64 images from other noise compare: PSNR against full precision, and the
Fréchet distance to its images, in the features of a network that classifies digits. Methods:

    nearest   weights rounded to nearest, scales of least square error
    fitted    recipe `fast` without tuning: weights fitted to the teacher's outputs, layer by layer
    tuned     `quick`, fitted and then tuned by distillation in 52 updates of 16 points, at a
              quarter of its rates; 256 points of 16 trajectories

Rows are kept in results/diffusion.json.
"""

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from support import mnist_ddpm
from support.places import RESULTS
from torch import Tensor, nn

import gdfq
from gdfq import demo
from gdfq.functional.grid import Bits
from gdfq.recipes import Recipe, find_recipe, recipe_for
from gdfq.student.scheme import Scheme
from gdfq.tuning.distill import Distillation
from gdfq.tuning.grid_adam import GridAdam

FILE = RESULTS / "diffusion.json"
BITS = ("w8a8", "wfp8afp8", "w4a8", "wfp4afp8")
METHODS = ("nearest", "fitted", "tuned")
STEPS, POINTS, SAMPLES = 20, 128, 64
TUNED_POINTS, TUNED_BATCH, TUNED_STEPS, CALIBRATION = 256, 16, 60, 8
"""Of tuning: points, batch, batches that are taken, and those of them that calibrate."""
RATE = 0.25
"""Of tuning, as a share of the rates of `quick`: at whole rates it loses what fitting gained."""
DENOISER: dict[str, Any] = {
    "scheduler": mnist_ddpm.SCHEDULER,
    "input_shape": mnist_ddpm.SHAPE,
    "sampling_steps": STEPS,
}


def recipe_of(method: str) -> Recipe:
    """The recipe of a method."""
    fitted = recipe_for("quick", Scheme(Bits.parse("w4a8"), "full"))  # it does not tune
    if method == "fitted":
        return replace(fitted, name="fitted")
    if method == "tuned":
        return tuned()
    return replace(fitted, name="nearest", match_moments=False, fit_weights=False)


def tuned() -> Recipe:
    """`quick` at lower rates."""
    quick = find_recipe("quick").with_steps(TUNED_STEPS)
    assert isinstance(quick.tuning, Distillation)
    rates = quick.tuning.optimizer
    assert isinstance(rates, GridAdam)
    slower = replace(
        rates,
        code_lr=RATE * rates.code_lr,
        scale_lr=RATE * rates.scale_lr,
        other_lr=RATE * rates.other_lr,
    )
    return replace(
        quick,
        name="tuned",
        calibration=CALIBRATION,
        warmup=CALIBRATION,
        tuning=replace(quick.tuning, optimizer=slower),
    )


@cache
def features() -> nn.Module:
    """A network that classifies digits of 8x8, without its last layer."""
    network = demo.train(demo.load_digits()[0], epochs=20)
    network.head = nn.Identity()
    return network


def features_of(images: Tensor) -> Tensor:
    """Features [N, 64] of digits of 28x28 in -0.5..0.5, whose margin is left out."""
    small = F.avg_pool2d(images[:, :, 2:-2, 2:-2], 3)
    pixels = ((small.clamp(-0.5, 0.5) + 0.5) * 255).round().to(torch.uint8)
    found: Tensor = features()(demo.PREPROCESSING(pixels))
    return found


def measured(bits: str, method: str, seed: int) -> dict[str, Any]:
    """One row."""
    network = mnist_ddpm.mnist_denoiser()
    features()  # it is trained here, before gradients are off
    images, batch = (TUNED_POINTS, TUNED_BATCH) if method == "tuned" else (POINTS, POINTS)
    started = time.perf_counter()
    quantized = gdfq.quantize(
        network, None, bits, recipe_of(method), images=images, batch=batch, seed=seed,
        samples=0, **DENOISER,
    )  # fmt: skip
    seconds = time.perf_counter() - started
    # All rows are compared on the same noise.
    found = gdfq.compare_samples(
        quantized, network, samples=SAMPLES, features=features_of, seed=0, **DENOISER
    )
    return {
        "network": "mnist",
        "bits": bits,
        "method": method,
        "seed": seed,
        **found.as_values(),
        "errors": [round(error, 2) for error in found.errors],
        "seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows in markdown, seeds together."""
    lines = [
        "| bits | method | seeds | PSNR in dB | a tenth below | Fréchet distance |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for key in product(BITS, METHODS):
        same = [row for row in rows if (row["bits"], row["method"]) == key]
        if same:
            figures = (in_words([r[n] for r in same]) for n in ("psnr", "psnr_low", "frechet"))
            lines.append(f"| {' | '.join(key)} | {len(same)} | {' | '.join(figures)} |")
    return "\n".join(lines)


def in_words(values: Sequence[float]) -> str:
    """The mean, with the spread if there are several."""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bits", nargs="+", default=[*BITS])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--table", action="store_true", help="print the rows as a table, and end")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = json.loads(FILE.read_text()) if FILE.exists() else []
    done = {(row["bits"], row["method"], row["seed"]) for row in rows}
    wanted = product(options.seeds, options.methods, options.bits)
    for seed, method, bits in () if options.table else wanted:
        if (bits, method, seed) in done:
            continue
        rows.append(measured(bits, method, seed))
        print({key: rows[-1][key] for key in ("bits", "method", "seed", "psnr")})
        FILE.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
