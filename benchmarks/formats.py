"""Floating-point grids beside integer grids of as many bits, with recipe `quick`.

    python -m benchmarks.formats                         # every row that is not there yet
    python -m benchmarks.formats --networks cifar10_resnet20 --seeds 0
    python -m benchmarks.formats --table

Placement `full`, all test images, the last step. A seed makes the same images for all rows of a
network. Rows are kept in results/formats.json, each with the formats that the search chose for
weights and activations; `--table` prints the rows, with the difference to integer grids of the same
seed.
"""

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any

import torch
from benchmarks.accuracy import compared, tested
from benchmarks.rows import complete
from benchmarks.trained_networks import NETWORKS
from support.places import RESULTS

import gdfq
from gdfq.functional.float_grid import NumberFormat
from gdfq.functional.grid import Bits
from gdfq.graph.capture import capture

FILE = RESULTS / "formats.json"
BITS = ("w8a8", "w4a8", "w4a4")


def as_float(bits: str) -> str:
    """The floating-point grids of as many bits."""
    found = Bits.parse(bits)
    return str(Bits(found.weights, found.activations, float_weights=True, float_activations=True))


def measured(name: str, seed: int, bits: str) -> dict[str, Any]:
    """One row."""
    network = NETWORKS[name]
    preprocessing = network.preprocessing
    teacher = capture(network.load(), torch.zeros(1, *network.shape))
    started = time.perf_counter()
    quantized = gdfq.quantize(
        teacher, None, bits, "quick", seed=seed, mean=preprocessing.mean, std=preprocessing.std
    )
    seconds = time.perf_counter() - started
    return {
        "network": name,
        "bits": bits,
        "seed": seed,
        "weight_formats": counted(weight.form for weight in quantized.network.weights),
        "activation_formats": counted(grid.form for grid in quantized.network.activations),
        **compared(*tested(quantized.network, teacher, network.test, preprocessing)),
        "seconds": round(seconds, 1),
        "torch": torch.__version__,
    }


def counted(forms: Iterable[NumberFormat | None]) -> dict[str, int]:
    """How many tensors have each format, the most frequent first."""
    return dict(Counter(form.name for form in forms if form is not None).most_common())


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows in markdown, seeds together, with the difference to integer grids."""
    by_key = {(row["network"], row["bits"], row["seed"]): row for row in rows}
    lines = [
        "| network (full precision) | bits | seeds | integer | floating point | formats of weights |"
        " formats of activations |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, bits in product(dict.fromkeys(row["network"] for row in rows), BITS):
        both = [(bits, as_float(bits))[i] for i in (0, 1)]
        seeds = [
            seed
            for network, found, seed in by_key
            if (network, found) == (name, bits) and (name, both[1], seed) in by_key
        ]
        if not seeds:
            continue
        integers, floats = ([by_key[name, b, seed] for seed in seeds] for b in both)
        whole, real = ([row["student"]["all"] for row in part] for part in (integers, floats))
        gains = [b - a for a, b in zip(whole, real, strict=True)]
        spread = f" ± {statistics.stdev(gains):.2f}" if len(gains) > 1 else ""
        lines.append(
            f"| {name} ({integers[0]['teacher']['all']:.2f}) | {bits} | {len(seeds)} "
            f"| {statistics.mean(whole):.2f} "
            f"| {statistics.mean(real):.2f} ({statistics.mean(gains):+.2f}{spread}) "
            f"| {in_words(floats[0]['weight_formats'])} "
            f"| {in_words(floats[0]['activation_formats'])} |"
        )
    return "\n".join(lines)


def in_words(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=[*NETWORKS])
    parser.add_argument("--bits", nargs="+", default=[b for i in BITS for b in (i, as_float(i))])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--table", action="store_true", help="print the rows as a table, and end")
    options = parser.parse_args()
    names = ("network", "seed", "bits")
    wanted = () if options.table else product(options.networks, options.seeds, options.bits)
    print(table(complete(FILE, names, wanted, measured, ["seconds", "student"])))


if __name__ == "__main__":
    main()
