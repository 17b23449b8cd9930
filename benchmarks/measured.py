"""Writes src/gdfq/analysis/measured.json, what `gdfq doctor` tells to expect, from benchmarks/results.

    python -m benchmarks.measured

The rows are those of `fast` in full, in the placement of published tables, one for each network and
number of bits.
"""

import argparse
import json
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from support.places import RESULTS, ROOT

FILE = ROOT / "src" / "gdfq" / "analysis" / "measured.json"
NETWORKS = {
    "cifar10_resnet20": "CIFAR-10 ResNet-20",
    "cifar10_resnet32": "CIFAR-10 ResNet-32",
    "cifar100_resnet56": "CIFAR-100 ResNet-56",
    "imagenet_mobilenetv1_025": "MobileNetV1 x0.25 (ImageNet)",
}
STEPS = 2400  # of `fast` in full
PLACEMENT = "relu"


def measured(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The mean drop over the seeds, for each network and number of bits."""
    drops: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        weights, activations = row["bits"][1:].split("a")
        in_full = row["recipe"] == "fast" and row.get("steps") == STEPS
        if in_full and row["placement"] == PLACEMENT and weights == activations:
            drop = row["teacher"]["all"] - row["student"]["all"]
            drops.setdefault((row["network"], int(weights)), []).append(drop)
    return [
        {
            "network": name,
            "bits": bits,
            "drop": round(statistics.fmean(drops[key, bits]), 2),
            "seeds": len(drops[key, bits]),
        }
        for key, name in NETWORKS.items()
        for bits in range(8, 1, -1)
        if (key, bits) in drops
    ]


def rows() -> list[dict[str, Any]]:
    """The rows of all accuracy benchmarks."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*-s*.json"))]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    FILE.write_text(json.dumps(measured(rows()), indent=1) + "\n")
    print(f"wrote {FILE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
