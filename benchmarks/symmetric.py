"""What the rules of a target for grids cost in accuracy, with recipe `quick`.

    python -m benchmarks.symmetric                       # every row that is not there yet
    python -m benchmarks.symmetric --networks cifar10_resnet20 --seeds 0
    python -m benchmarks.symmetric --table

The default grids beside those of target `tensorrt` (zero points of activations 0) and of `qnn`
(zero points of weights 0; at w8a8 the default has that, too). Placement `full`, all test images,
the last step. A seed makes the same images for all rows of a network. Rows are kept in
results/symmetric.json; `--table` prints them with the difference to the default of the same seed.
"""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import torch
from benchmarks.accuracy import compared, tested
from benchmarks.rows import complete
from benchmarks.trained_networks import NETWORKS
from support.places import RESULTS

import gdfq
from gdfq.graph.capture import capture

FILE = RESULTS / "symmetric.json"
DEFAULT = "default"
GRIDS = (DEFAULT, "tensorrt", "qnn")
"""The default grids, and those that a target asks for."""
BITS = ("w8a8", "w4a8")


def measured(name: str, seed: int, bits: str, grids: str) -> dict[str, Any]:
    """One row."""
    network = NETWORKS[name]
    preprocessing = network.preprocessing
    teacher = capture(network.load(), torch.zeros(1, *network.shape))
    quantized = gdfq.quantize(
        teacher, None, bits, "quick", seed=seed, target=None if grids == DEFAULT else grids,
        mean=preprocessing.mean, std=preprocessing.std,
    )  # fmt: skip
    return {
        "network": name,
        "bits": bits,
        "seed": seed,
        "grids": grids,
        **compared(*tested(quantized.network, teacher, network.test, preprocessing)),
        "torch": torch.__version__,
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows in markdown, seeds together, with the difference to the default grids."""
    top1 = {
        (row["network"], row["bits"], row["grids"], row["seed"]): row["student"]["all"]
        for row in rows
    }
    teachers = {row["network"]: row["teacher"]["all"] for row in rows}
    lines = [
        "| network (full precision) | bits | seeds | default | tensorrt | qnn |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, bits in dict.fromkeys((row["network"], row["bits"]) for row in rows):
        seeds = sorted(seed for *key, seed in top1 if key == [name, bits, DEFAULT])
        cells = []
        for grids in GRIDS:
            found = [top1[name, bits, grids, s] for s in seeds if (name, bits, grids, s) in top1]
            cells.append(f"{statistics.mean(found):.2f}" if found else "")
            if found and grids != DEFAULT:
                paired = [
                    top1[name, bits, grids, s] - top1[name, bits, DEFAULT, s]
                    for s in seeds
                    if (name, bits, grids, s) in top1
                ]
                cells[-1] += f" ({statistics.mean(paired):+.2f})"
        lines.append(
            f"| {name} ({teachers[name]:.2f}) | {bits} | {len(seeds)} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=[*NETWORKS])
    parser.add_argument("--bits", nargs="+", default=BITS)
    parser.add_argument("--grids", nargs="+", choices=GRIDS, default=GRIDS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--table", action="store_true", help="print the rows as a table, and end")
    options = parser.parse_args()
    names = ("network", "seed", "bits", "grids")
    wanted = product(options.networks, options.seeds, options.bits, options.grids)
    print(table(complete(FILE, names, () if options.table else wanted, measured, ["student"])))


if __name__ == "__main__":
    main()
