"""Denoisers of diffusion models on their own trajectories: integer and floating-point grids.

    python -m benchmarks.diffusion                       # every row that is not there yet
    python -m benchmarks.diffusion --networks digits --seeds 0 --bits wfp8afp8
    python -m benchmarks.diffusion --table

`mnist` is the denoiser of ../shared, of 28x28; `digits` a class-conditional UNet2DModel of 8x8
that is trained here. Both make 20 steps of DDIM. 128 points of trajectories quantize (256 tune);
images from other noise compare: PSNR against full precision, and the Fréchet distance to its
images, in the features of a network that classifies digits. Methods:

    nearest   weights rounded to nearest, scales of least square error
    fitted    recipe `fast` without tuning: weights fitted to the teacher's outputs, layer by layer
    tuned     `quick`, fitted and then tuned by distillation in 52 updates of 16 points, at a
              quarter of its rates; 256 points of 16 trajectories
    learned   reconstruction of blocks with learned rounding, as `genie` has it, in 300
              updates of 16 of 256 points for each block

Rows are kept in results/diffusion.json.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks.rows import complete
from support import digits_ddpm, mnist_ddpm
from support.places import RESULTS
from torch import Tensor, nn

import gdfq
from gdfq import demo
from gdfq.functional.grid import Bits
from gdfq.recipes import Recipe, find_recipe, recipe_for
from gdfq.student.scheme import Scheme
from gdfq.tuning.distill import Distillation
from gdfq.tuning.grid_adam import GridAdam
from gdfq.tuning.reconstruct import Reconstruction

FILE = RESULTS / "diffusion.json"
BITS = ("w8a8", "wfp8afp8", "w4a8", "wfp4afp8")
METHODS = ("nearest", "fitted", "tuned", "learned")
STEPS, POINTS = 20, 128
TUNED_POINTS, TUNED_BATCH, TUNED_STEPS, CALIBRATION = 256, 16, 60, 8
"""Of tuning: points, batch, batches that are taken, and those of them that calibrate."""
RATE = 0.25
"""Of tuning, as a share of the rates of `quick`: at whole rates it loses what fitting gained."""
UPDATES = 300
"""Of each block, where rounding is learned."""


@dataclass(frozen=True)
class Bed:
    """A denoiser, and how its images are compared.

    Attributes:
        model: Returns what `gdfq.quantize` takes.
        options: What it has to be told.
        samples: Images that are compared.
        digits: Returns the pixels [N, 1, 8, 8] of its images.
    """

    model: Callable[[], Any]
    options: Mapping[str, Any]
    samples: int
    digits: Callable[[Tensor], Tensor]


def _small_digits(images: Tensor) -> Tensor:
    """Pixels of digits of 28x28 in -0.5..0.5, whose margin is left out."""
    small = F.avg_pool2d(images[:, :, 2:-2, 2:-2], 3)
    return ((small.clamp(-0.5, 0.5) + 0.5) * 255).round().to(torch.uint8)


BEDS = {
    "mnist": Bed(
        mnist_ddpm.mnist_denoiser,
        {"scheduler": mnist_ddpm.SCHEDULER, "input_shape": mnist_ddpm.SHAPE},
        64,
        _small_digits,
    ),
    "digits": Bed(
        lambda: f"diffusers:{digits_ddpm.digits_pipeline()}", {}, 256, digits_ddpm.pixels
    ),
}


def recipe_of(method: str) -> Recipe:
    """The recipe of a method."""
    if method == "tuned":
        return tuned()
    if method == "learned":
        return learned()
    fitted = recipe_for("quick", Scheme(Bits.parse("w4a8"), "full"))  # it does not tune
    if method == "fitted":
        return replace(fitted, name="fitted")
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


def learned() -> Recipe:
    """`genie` on as many points as `tuned`, with batches as large."""
    genie = find_recipe("genie")
    assert isinstance(genie.tuning, Reconstruction)
    return replace(
        genie,
        name="learned",
        steps=CALIBRATION + UPDATES,
        calibration=CALIBRATION,
        warmup=CALIBRATION,
        tuning=replace(genie.tuning, images=TUNED_POINTS, batch=TUNED_BATCH),
        placement="full",
    )


@cache
def classifier() -> nn.Module:
    """A network that classifies digits of 8x8, without its last layer: features [N, 64]."""
    network = demo.train(demo.load_digits()[0], epochs=20)
    network.head = nn.Identity()
    return network


def measured(name: str, bits: str, method: str, seed: int) -> dict[str, Any]:
    """One row."""
    bed = BEDS[name]
    model = bed.model()
    network = classifier()  # it is trained here, before gradients are off

    def features(images: Tensor) -> Tensor:
        found: Tensor = network(demo.PREPROCESSING(bed.digits(images)))
        return found

    trains = method in ("tuned", "learned")
    images, batch = (TUNED_POINTS, TUNED_BATCH) if trains else (POINTS, POINTS)
    options: dict[str, Any] = {**bed.options, "sampling_steps": STEPS}
    started = time.perf_counter()
    quantized = gdfq.quantize(
        model, None, bits, recipe_of(method), images=images, batch=batch, seed=seed, samples=0,
        **options,
    )  # fmt: skip
    seconds = time.perf_counter() - started
    # All rows are compared on the same noise.
    found = gdfq.compare_samples(
        quantized, model, samples=bed.samples, features=features, seed=0, **options
    )
    return {
        "network": name,
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
        "| network | bits | method | seeds | PSNR in dB | a tenth below | Fréchet distance |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for key in product(BEDS, BITS, METHODS):
        same = [row for row in rows if (row["network"], row["bits"], row["method"]) == key]
        if same:
            figures = (in_words([r[n] for r in same]) for n in ("psnr", "psnr_low", "frechet"))
            lines.append(f"| {' | '.join(key)} | {len(same)} | {' | '.join(figures)} |")
    return "\n".join(lines)


def in_words(values: Sequence[float], digits: int = 2) -> str:
    """The mean, with the spread if there are several."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", choices=BEDS, default=[*BEDS])
    parser.add_argument("--bits", nargs="+", default=[*BITS])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--table", action="store_true", help="print the rows as a table, and end")
    options = parser.parse_args()
    names = ("network", "bits", "method", "seed")
    wanted = product(options.networks, options.bits, options.methods, options.seeds)
    shown = ("psnr", "frechet")
    print(table(complete(FILE, names, () if options.table else wanted, measured, shown)))


if __name__ == "__main__":
    main()
