"""Accuracy drops that benchmarks measured, which `gdfq doctor` quotes.

`measured_drops.json` is written by `python -m benchmarks.tables --measured-drops` from the rows
under `benchmarks/results`.
"""

import json
from dataclasses import dataclass
from importlib.resources import files


@dataclass(frozen=True)
class MeasuredDrop:
    """The accuracy drop of one network at one bit width.

    Attributes:
        network: The network, as people call it.
        bits: Bits of weights and activations.
        points: Top-1 of the full-precision network minus that of the quantized one, in percentage
            points; the mean over seeds.
        seeds: How many runs the mean is of.
    """

    network: str
    bits: int
    points: float
    seeds: int


def measured_drops() -> tuple[MeasuredDrop, ...]:
    """All measured drops of recipe `fast` without data, at placement `relu`."""
    text = files("gdfq.analysis").joinpath("measured_drops.json").read_text(encoding="utf-8")
    return tuple(MeasuredDrop(**row) for row in json.loads(text))


def in_words(bits: int) -> str | None:
    """One sentence on what these bits of weights and activations lost; None if not measured."""
    found = [drop for drop in measured_drops() if drop.bits == bits]
    if not found:
        return None
    parts = [f"{_points(drop.points)} on {drop.network}" for drop in found]
    listed = ", ".join(parts[:-1]) + " and " * (len(parts) > 1) + parts[-1]
    return f"{bits} bits lost {listed} (recipe fast, without data)."


def _points(points: float) -> str:
    return f"{points:.1f} point{'' if f'{points:.1f}' == '1.0' else 's'}"
