"""Writes src/gdfq/analysis/measured.json, what `gdfq doctor` tells to expect, from benchmarks/results.

    python -m benchmarks.measured

The rows are those of `fast` in full in the deployable placement, one for each network and widths:
of `benchmarks.accuracy` where it tunes, of `benchmarks.defaults` where it does what `quick` does.
"""

import argparse
import json
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.defaults import FILE as DEFAULTS
from benchmarks.trained_networks import EFFICIENTNET, MOBILE, R20, R32, R56, UNSEEN
from support.places import RESULTS, ROOT

from gdfq.functional.grid import Bits
from gdfq.recipes import find_recipe

FILE = ROOT / "src" / "gdfq" / "analysis" / "measured.json"
NETWORKS = {
    R20: "CIFAR-10 ResNet-20",
    R32: "CIFAR-10 ResNet-32",
    R56: "CIFAR-100 ResNet-56",
    MOBILE: "MobileNetV1 x0.25 (ImageNet)",
    EFFICIENTNET: "EfficientNet-Lite0 (ImageNet)",
    UNSEEN: "EfficientNet-Lite2 (ImageNet)",
}
STEPS = find_recipe("fast").steps
PLACEMENT = "full"
UNTUNED = ("w8a8", "w4a8")
"""Widths of the rows of `benchmarks.defaults` at which `fast` and `quick` are the same."""


def measured(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The mean drop over the seeds, for each network and widths."""
    drops: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        tuned = (row.get("recipe"), row.get("steps"), row.get("placement")) == (
            "fast",
            STEPS,
            PLACEMENT,
        )
        if tuned or ("recipe" not in row and row["bits"] in UNTUNED):
            drop = row["teacher"]["all"] - row["student"]["all"]
            drops.setdefault((row["network"], row["bits"]), []).append(drop)
    return [
        {
            "network": NETWORKS[network],
            "bits": bits,
            "drop": round(statistics.fmean(found), 2),
            "seeds": len(found),
        }
        for (network, bits), found in sorted(drops.items(), key=place)
    ]


def place(item: tuple[tuple[str, str], list[float]]) -> tuple[int, list[int]]:
    """Order of the rows: by network, then from many bits to few."""
    (network, bits), _ = item
    widths = Bits.parse(bits)
    return list(NETWORKS).index(network), [-widths.weights, -widths.activations]


def rows() -> list[dict[str, Any]]:
    """The rows of both benchmarks; those of `benchmarks.defaults` name no recipe."""
    tuned = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*-s[0-9]*.json"))]
    return [*tuned, *json.loads(DEFAULTS.read_text())]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    FILE.write_text(json.dumps(measured(rows()), indent=1) + "\n")
    print(f"wrote {FILE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
