"""What images from elsewhere bring: proxies beside optimised and real images, with recipe `quick`.

    python -m benchmarks.proxies                       # every row that is not there yet
    python -m benchmarks.proxies --networks cifar10_resnet20 --seeds 0 --bits w3a3
    python -m benchmarks.proxies --table

Placement `full`, all test images, the last step; recipe, steps and seed of the rows of one table
line are the same. The proxies of CIFAR-10 networks are CIFAR-100 images and the reverse; those of
MobileNetV1 are CIFAR-10 images, enlarged. `alone` is on as many images as the mixture has. The last
column is on real training images, which the user of proxies does not have. Rows are kept in
results/proxies.json.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks.accuracy import compared, tested
from benchmarks.rows import complete
from benchmarks.trained_networks import NETWORKS
from support.places import RESULTS, SHARED
from torch import Tensor

import gdfq
from gdfq.data.datasets import ArrayData, load_unlabelled
from gdfq.data.preprocessing import Resize
from gdfq.execution.context import Context
from gdfq.execution.seeding import stream
from gdfq.graph.capture import Captured, capture
from gdfq.recipes import QUICK
from gdfq.sources.candidates import Candidates, Screen
from gdfq.sources.pool import ImagePool, collect
from gdfq.sources.screen import screened

FILE = RESULTS / "proxies.json"
BITS = {
    "cifar10_resnet20": ("w3a3",),
    "cifar100_resnet56": ("w4a4", "w3a3"),
    "imagenet_mobilenetv1_025": ("w4a4", "w4a8"),
}
PROXIES = {
    "cifar10_resnet20": "cifar100_train5k.npz",
    "cifar100_resnet56": "cifar10_train5k.npz",
    "imagenet_mobilenetv1_025": "cifar10_train5k.npz",
}


@dataclass(frozen=True)
class Setting:
    """What the options of a row are made of."""

    teacher: Captured
    screened: Candidates
    seed: int
    real: Path | None

    @property
    def unscreened(self) -> Candidates:
        return replace(self.screened, screen=Screen(filters=False))

    @property
    def pool(self) -> ImagePool:
        """The pool of recipe `quick` for the network."""
        pool = QUICK.fitted(self.teacher.input_shape).source
        assert isinstance(pool, ImagePool)
        return pool

    def alone(self, candidates: Candidates) -> Tensor:
        """As many kept candidates as the mixture has images."""
        pool, context = self.pool, Context(seed=self.seed)
        own, _ = collect(pool.source, self.teacher, pool.images, context=context)
        return screened(self.teacher, own, candidates, 2 * pool.images, context)[1]

    def training(self) -> ArrayData:
        """As many training images as the mixture has, at random."""
        assert self.real is not None
        data = load_unlabelled(self.real, self.teacher.input_shape, Resize())
        order = torch.randperm(len(data), generator=stream(self.seed, "benchmark.proxies"))
        return ArrayData(data.images(order[: 2 * self.pool.images]), None)


POOLS: Mapping[str, Callable[[Setting], dict[str, Any]]] = {
    "optimised": lambda _: {},
    "alone, unscreened": lambda setting: {"data": setting.alone(setting.unscreened)},
    "alone, screened": lambda setting: {"data": setting.alone(setting.screened)},
    "mixed, unscreened": lambda setting: {"proxy": setting.unscreened},
    "mixed": lambda setting: {"proxy": setting.screened},
    "real": lambda setting: {"data": setting.training()},
}
"""What `gdfq.quantize` gets in each row."""


def measured(name: str, seed: int, pool: str, bits: str) -> dict[str, Any]:
    """One row."""
    network = NETWORKS[name]
    preprocessing = network.preprocessing
    teacher = capture(network.load(), torch.zeros(1, *network.shape))
    proxies = load_unlabelled(SHARED / "data" / PROXIES[name], network.shape, preprocessing.resize)
    started = time.process_time()
    setting = Setting(teacher, Candidates(proxies, preprocessing), seed, network.train)
    options = POOLS[pool](setting)
    quantized = gdfq.quantize(
        teacher, None, bits, "quick", seed=seed, mean=preprocessing.mean, std=preprocessing.std,
        **options,
    )  # fmt: skip
    seconds = time.process_time() - started
    student, expected, labels = tested(quantized.network, teacher, network.test, preprocessing)
    return {
        "network": name,
        "bits": bits,
        "seed": seed,
        "pool": pool,
        **compared(student, expected, labels),
        "kl": kl(student[::2], expected[::2]),
        "cpu_seconds": round(seconds, 1),
        "candidates": quantized.metrics.get("candidates"),
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

    A cell with fewer seeds than its line says how many it has.
    """
    lines = [
        f"| network (full precision) | bits | seeds | {' | '.join(POOLS)} |",
        "| --- |" + " --- |" * (2 + len(POOLS)),
    ]
    for name, bits in dict.fromkeys((row["network"], row["bits"]) for row in rows):
        group = [row for row in rows if (row["network"], row["bits"]) == (name, bits)]
        seeds = len({row["seed"] for row in group})
        cells = []
        for pool in POOLS:
            found = [row for row in group if row["pool"] == pool]
            if not found:
                cells.append("")
                continue
            drop = statistics.mean(row["teacher"]["all"] - row["student"]["all"] for row in found)
            fewer = f", {len(found)} of {seeds} seeds" if len(found) < seeds else ""
            cells.append(f"{drop:.2f} ({statistics.mean(row['kl'] for row in found):.3f}{fewer})")
        full = group[0]["teacher"]["all"]
        lines.append(f"| {name} ({full:.2f}) | {bits} | {seeds} | {' | '.join(cells)} |")
    return "\n".join(lines)


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
        (name, seed, pool, bits)
        for name, seed, pool in product(options.networks, options.seeds, options.pools)
        if pool != "real" or NETWORKS[name].train is not None
        for bits in BITS[name]
        if not options.bits or bits in options.bits
    )
    names = ("network", "seed", "pool", "bits")
    rows = complete(FILE, names, () if options.table else wanted, measured, ["student", "kl"])
    print(table(rows))


if __name__ == "__main__":
    main()
