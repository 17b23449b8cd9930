"""What images from elsewhere bring: proxies beside optimised and real images, with recipe `quick`.

    python -m benchmarks.proxies                       # every row that is not there yet
    python -m benchmarks.proxies --networks cifar10_resnet20 --seeds 0 --bits w3a3
    python -m benchmarks.proxies --table

Placement `full`, all test images, the last step; recipe, steps and seed of the rows of one table
line are the same. The proxies of CIFAR-10 networks are CIFAR-100 images and the reverse; those of
networks of 224x224 are CIFAR-10 images, enlarged, and 1,024 crops of the photographs that
scikit-image and scikit-learn bring. `alone` is on as many images as the mixture has, or as pass the
screen. The last column is on real training images, which the user of proxies does not have. Rows are
kept in results/proxies.json.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from benchmarks.accuracy import compared, tested
from benchmarks.rows import complete
from benchmarks.trained_networks import EFFICIENTNET, MOBILE, NETWORKS, R20, R56, Network
from PIL import Image
from support.places import RESULTS, SHARED
from torch import Tensor

import gdfq
from gdfq.data.datasets import ArrayData, ImageData, load_unlabelled
from gdfq.data.preprocessing import Resize
from gdfq.execution.context import Context
from gdfq.execution.seeding import stream
from gdfq.functional.grid import Bits
from gdfq.graph.capture import Captured, capture
from gdfq.recipes import recipe_for
from gdfq.sources.candidates import Candidates, Screen, Screening
from gdfq.sources.pool import ImagePool, collect
from gdfq.sources.screen import screened
from gdfq.student.scheme import Scheme

FILE = RESULTS / "proxies.json"
BITS = {
    R20: ("w3a3",),
    R56: ("w4a4", "w3a3"),
    MOBILE: ("w4a4", "w4a8"),
    EFFICIENTNET: ("w4a4", "w4a8"),
}
PHOTOGRAPHS = (
    "astronaut.png", "brick.png", "camera.png", "chelsea.png", "clock_motion.png", "coffee.png",
    "coins.png", "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png",
    "motorcycle_left.png", "retina.jpg", "rocket.jpg",
)  # fmt: skip
"""Of scikit-image, one of each thing."""
CROPS, LEAST_AREA = 1024, 0.1
"""Crops of photographs, and the least share of a photograph that one shows."""


def cifar(classes: int) -> Callable[[Network], ImageData]:
    """Training images of CIFAR, enlarged where the network takes larger ones."""

    def images(network: Network) -> ImageData:
        file = SHARED / "data" / f"cifar{classes}_train5k.npz"
        return load_unlabelled(file, network.shape, network.preprocessing.resize)

    return images


def photographs(network: Network) -> ImageData:
    """Random square crops of photographs, resized to the network's input.

    Raises:
        ImportError: scikit-image or scikit-learn is not installed.
    """
    of_image = Path(import_module("skimage.data").__file__ or "").parent
    of_learn = Path(import_module("sklearn.datasets").__file__ or "").parent / "images"
    files = [of_image / name for name in PHOTOGRAPHS] + sorted(of_learn.glob("*.jpg"))
    pictures = [Image.open(file).convert("RGB") for file in files]
    draw = np.random.default_rng(0)
    size = network.shape[1:]
    crops = []
    for number in range(CROPS):
        picture = pictures[number % len(pictures)]
        side = int(min(picture.size) * np.sqrt(draw.uniform(LEAST_AREA, 1)))
        left, top = (int(draw.integers(whole - side + 1)) for whole in picture.size)
        crop = picture.crop((left, top, left + side, top + side)).resize(size[::-1])
        crops.append(np.asarray(crop).transpose(2, 0, 1))
    return ArrayData(torch.from_numpy(np.stack(crops)), None)


PROXIES: Mapping[str, Callable[[Network], ImageData]] = {
    "CIFAR-10": cifar(10),
    "CIFAR-100": cifar(100),
    "photographs": photographs,
}
PROXIES_OF = {
    R20: ("CIFAR-100",),
    R56: ("CIFAR-10",),
    MOBILE: ("CIFAR-10", "photographs"),
    EFFICIENTNET: ("CIFAR-10", "photographs"),
}


@dataclass(frozen=True)
class Setting:
    """What the options of a row are made of."""

    teacher: Captured
    network: Network
    bits: str
    seed: int

    @property
    def pool(self) -> ImagePool:
        """The pool of recipe `quick` for the network and the bits."""
        recipe = recipe_for("quick", Scheme(Bits.parse(self.bits), "full"))
        pool = recipe.fitted(self.teacher.input_shape).source
        assert isinstance(pool, ImagePool)
        return pool

    def candidates(self, proxies: str, screen: Screen) -> Candidates:
        images = PROXIES[proxies](self.network)
        return Candidates(images, self.network.preprocessing, screen=screen)

    def alone(self, candidates: Candidates) -> tuple[Screening, Tensor]:
        """As many kept candidates as the mixture has images."""
        pool, context = self.pool, Context(seed=self.seed)
        own, _ = collect(pool.source, self.teacher, pool.images, context=context)
        return screened(self.teacher, own, candidates, 2 * pool.images, context)[:2]

    def training(self) -> ArrayData:
        """As many training images as the mixture has, at random."""
        assert self.network.train is not None
        data = load_unlabelled(self.network.train, self.teacher.input_shape, Resize())
        order = torch.randperm(len(data), generator=stream(self.seed, "benchmark.proxies"))
        return ArrayData(data.images(order[: 2 * self.pool.images]), None)


OPTIMISED, REAL = "optimised", "real"
SCREENS = {"unscreened": Screen(filters=False), "screened": Screen()}
ALONE = {f"alone, {name}": screen for name, screen in SCREENS.items()}
MIXED = {"mixed, unscreened": SCREENS["unscreened"], "mixed": SCREENS["screened"]}
POOLS = (OPTIMISED, *ALONE, *MIXED, REAL)
"""Images of a row; `mixed` is what `--proxy` does."""


def measured(name: str, seed: int, pool: str, proxies: str | None, bits: str) -> dict[str, Any]:
    """One row; without student and KL where the screen refuses all images."""
    network = NETWORKS[name]
    preprocessing = network.preprocessing
    teacher = capture(network.load(), torch.zeros(1, *network.shape))
    started = time.process_time()
    setting = Setting(teacher, network, bits, seed)
    options: dict[str, Any] = {}
    found: Screening | None = None
    if pool == REAL:
        options["data"] = setting.training()
    elif proxies is not None and pool in MIXED:
        options["proxy"] = setting.candidates(proxies, MIXED[pool])
    elif proxies is not None:
        found, options["data"] = setting.alone(setting.candidates(proxies, ALONE[pool]))
    row = {"network": name, "bits": bits, "seed": seed, "pool": pool, "proxies": proxies}
    screening = None if found is None else found.as_values()
    if found is not None and found.refused:
        return {**row, "student": None, "kl": None, "candidates": screening}
    quantized = gdfq.quantize(
        teacher, None, bits, "quick", seed=seed, mean=preprocessing.mean, std=preprocessing.std,
        **options,
    )  # fmt: skip
    seconds = time.process_time() - started
    student, expected, labels = tested(quantized.network, teacher, network.test, preprocessing)
    return {
        **row,
        **compared(student, expected, labels),
        "kl": kl(student[::2], expected[::2]),
        "cpu_seconds": round(seconds, 1),
        "candidates": quantized.metrics.get("candidates") or screening,
        "torch": torch.__version__,
    }


def kl(student: Tensor, teacher: Tensor) -> float:
    """KL(teacher ‖ student) of the predictions for some images, in nats."""
    found = F.kl_div(
        student.log_softmax(1), teacher.log_softmax(1), reduction="batchmean", log_target=True
    )
    return round(float(found), 4)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows in markdown: mean drop of top-1 in points, and mean KL on the even half.

    A cell with fewer seeds than its line says how many it has; *refused* is a pool of which the
    screen uses nothing.
    """
    lines = [
        f"| network (full precision) | proxies | bits | seeds | {' | '.join(POOLS)} |",
        "| --- | --- |" + " --- |" * (2 + len(POOLS)),
    ]
    networks_bits = dict.fromkeys((row["network"], row["bits"]) for row in rows)
    for (name, bits), proxies in ((key, p) for key in networks_bits for p in PROXIES_OF[key[0]]):
        group = [
            row
            for row in rows
            if (row["network"], row["bits"]) == (name, bits) and row["proxies"] in (None, proxies)
        ]
        seeds = len({row["seed"] for row in group})
        cells = [_cell([row for row in group if row["pool"] == pool], seeds) for pool in POOLS]
        full = group[0]["teacher"]["all"]
        lines.append(
            f"| {name} ({full:.2f}) | {proxies} | {bits} | {seeds} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def _cell(rows: Sequence[Mapping[str, Any]], seeds: int) -> str:
    """Mean drop and mean KL of the seeds of one pool."""
    used = [row for row in rows if not (row.get("candidates") or {}).get("refused")]
    if not used:
        return "refused" if rows else ""
    drop = statistics.mean(row["teacher"]["all"] - row["student"]["all"] for row in used)
    fewer = f", {len(used)} of {seeds} seeds" if len(used) < seeds else ""
    return f"{drop:.2f} ({statistics.mean(row['kl'] for row in used):.3f}{fewer})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", choices=BITS, default=[*BITS])
    parser.add_argument("--bits", nargs="+")
    parser.add_argument("--pools", nargs="+", choices=POOLS, default=[*POOLS])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--table", action="store_true", help="print the rows as a table, and end")
    options = parser.parse_args()
    wanted = (
        (name, seed, pool, proxies, bits)
        for name, seed, pool in product(options.networks, options.seeds, options.pools)
        if pool != REAL or NETWORKS[name].train is not None
        for proxies in ((None,) if pool in (OPTIMISED, REAL) else PROXIES_OF[name])
        for bits in BITS[name]
        if not options.bits or bits in options.bits
    )
    names = ("network", "seed", "pool", "proxies", "bits")
    rows = complete(FILE, names, () if options.table else wanted, measured, ["student", "kl"])
    print(table(rows))


if __name__ == "__main__":
    main()
