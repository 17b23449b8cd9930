"""Does the batch-norm distance of a pool of images tell beforehand what the pool teaches?

    python -m benchmarks.pools                     # every row that is not there yet, then the table
    python -m benchmarks.pools --networks cifar10_resnet20

A student of recipe `quick` (placement `full`, seed 0) is made from 256 images of one pool alone, and
compared with its teacher on all test images. The pools go from the network's own training images
to noise. The screen of `--proxy` takes the distance on 128 images. Below the rows of a network
stands Spearman's correlation of the ranks of distance and KL, and the processor seconds in which the
screen judges 10,000 candidates. Rows are kept in results/pools.json.
"""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks.accuracy import compared, tested
from benchmarks.proxies import cifar, kl, photographs
from benchmarks.rows import complete
from benchmarks.trained_networks import MOBILE, NETWORKS, R20, Network
from sklearn.datasets import load_digits
from support.places import RESULTS
from torch import Tensor

import gdfq
from gdfq.data.datasets import ArrayData
from gdfq.execution.context import Context
from gdfq.execution.seeding import stream
from gdfq.functional.grid import Bits
from gdfq.graph.capture import Captured, capture
from gdfq.recipes import recipe_for
from gdfq.sources.candidates import Candidates, Screen
from gdfq.sources.noise import noise_like_inputs
from gdfq.sources.pool import ImagePool, collect
from gdfq.sources.screen import Judge, screened
from gdfq.student.scheme import Scheme

FILE = RESULTS / "pools.json"
BITS = {R20: ("w4a4", "w3a3"), MOBILE: ("w4a8",)}
IMAGES, JUDGED, CANDIDATES = 256, 128, 10_000
"""Images of a student, those of a distance, and candidates of the timed screen."""
SCREEN = f"screen of {CANDIDATES:,}"


def optimised(teacher: Captured, network: Network) -> Tensor:
    """Images of recipe `quick`."""
    source = recipe_for("quick", Scheme(Bits.parse("w4a4"), "full")).fitted(network.shape)
    assert isinstance(source.source, ImagePool)
    return collect(source.source.source, teacher, IMAGES, context=Context())[0]


def loaded(read: Callable[[Network], Any]) -> Callable[[Captured, Network], Tensor]:
    """Random images of a data set, normalised."""

    def images(_: Captured, network: Network) -> Tensor:
        data = read(network)
        chosen = torch.randperm(len(data), generator=stream(0, "benchmark.pools"))[:IMAGES]
        return Candidates(data, network.preprocessing).images(chosen, torch.device("cpu"))

    return images


def digits(network: Network) -> ArrayData:
    """Handwritten digits of 8x8, enlarged, in grey."""
    pixels = torch.from_numpy(load_digits().images)[:, None].float().mul(255 / 16)
    large = F.interpolate(pixels, network.shape[1:], mode="bilinear").expand(-1, 3, -1, -1)
    return ArrayData(large.round().to(torch.uint8).contiguous(), None)


def noise(kind: str) -> Callable[[Captured, Network], Tensor]:
    """Noise with the statistics of the network's inputs."""
    return lambda teacher, _: noise_like_inputs(IMAGES, teacher)[kind]


POOLS: Mapping[str, Callable[[Captured, Network], Tensor]] = {
    "optimised": optimised,
    "CIFAR-10": loaded(cifar(10)),
    "CIFAR-100": loaded(cifar(100)),
    "photographs": loaded(photographs),
    "1/f noise": noise("natural"),
    "white noise": noise("white"),
    "digits": loaded(digits),
}


def measured(name: str, bits: str, pool: str) -> dict[str, Any]:
    """A pool's distance and what it teaches; or the time of a screen."""
    network = NETWORKS[name]
    teacher = capture(network.load(), torch.zeros(1, *network.shape))
    row = {"network": name, "bits": bits, "pool": pool}
    if pool == SCREEN:
        return {**row, **screening(teacher, network), "distance": None, "kl": None}
    images = POOLS[pool](teacher, network)
    distance = Judge(teacher, Screen(), Context()).distance(images[:JUDGED])
    preprocessing = network.preprocessing
    data = ArrayData(preprocessing.pixels(images), None)
    student = gdfq.quantize(
        teacher, None, bits, "quick", data=data, mean=preprocessing.mean, std=preprocessing.std
    )
    outputs, expected, labels = tested(student.network, teacher, network.test, preprocessing)
    return {
        **row,
        **compared(outputs, expected, labels),
        "distance": round(float(distance), 4),
        "kl": kl(outputs, expected),
        "torch": torch.__version__,
    }


def screening(teacher: Captured, network: Network) -> dict[str, Any]:
    """Processor seconds in which both CIFAR training sets are judged, each image once."""
    both = [cifar(classes)(network) for classes in (10, 100)]
    everything = torch.arange(CANDIDATES // len(both))
    pixels = torch.cat([part.images(everything) for part in both])
    candidates = Candidates(ArrayData(pixels, None), network.preprocessing)
    own = optimised(teacher, network)
    started = time.process_time()
    found, *_ = screened(teacher, own, candidates, CANDIDATES, Context())
    seconds = time.process_time() - started
    assert len(found.judged) == CANDIDATES
    return {"cpu_seconds": round(seconds, 1), "candidates": found.as_values()}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows in markdown, those of least distance first."""
    lines = ["| network | bits | images | distance | KL | top-1 |", "| --- |" + " --- |" * 5]
    for name, bits in [(network, each) for network in BITS for each in BITS[network]]:
        group = [row for row in rows if (row["network"], row["bits"]) == (name, bits)]
        pools = sorted((row for row in group if row["kl"] is not None), key=_distance)
        lines += [
            f"| {name} | {bits} | {row['pool']} | {row['distance']:.3f} | {row['kl']:.3f} | "
            f"{row['student']['all']:.2f} |"
            for row in pools
        ]
        if len(pools) > 1:
            lines.append(f"| | | rank correlation | {rank_correlation(pools):.2f} | | |")
        lines += [
            f"| {name} | | {row['pool']} | {row['cpu_seconds']:.0f} s | | |"
            for row in group
            if row["pool"] == SCREEN
        ]
    return "\n".join(lines)


def _distance(row: Mapping[str, Any]) -> float:
    return float(row["distance"])


def rank_correlation(rows: Sequence[Mapping[str, Any]]) -> float:
    """Spearman's correlation of distance and KL, for rows without ties."""
    columns = [torch.tensor([row[name] for row in rows]) for name in ("distance", "kl")]
    ranks = torch.stack([values.argsort().argsort().double() for values in columns])
    return float(torch.corrcoef(ranks)[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", choices=BITS, default=[*BITS])
    parser.add_argument("--table", action="store_true", help="print the rows as a table, and end")
    options = parser.parse_args()
    wanted = [
        (name, bits, pool)
        for name in options.networks
        for bits in BITS[name]
        for pool in (*POOLS, *([SCREEN] if (name, bits) == (R20, BITS[R20][0]) else []))
        if pool != "CIFAR-10" or name == R20
    ]
    names = ("network", "bits", "pool")
    print(table(complete(FILE, names, () if options.table else wanted, measured, ["kl"])))


if __name__ == "__main__":
    main()
