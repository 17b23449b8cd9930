"""Accuracy drops that were measured on real networks, for what `doctor` tells to expect.

`measured.json` beside this module is written by `python -m benchmarks.measured` from the result
files of the benchmarks.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files

from gdfq.functional.grid import Bits


@dataclass(frozen=True)
class MeasuredDrop:
    """The drop of one network with the recipe `fast`, without data.

    Attributes:
        network: Name of the network.
        bits: Bits of weights and activations, such as "w4a8".
        drop: Points of top-1 accuracy that were lost, the mean over the seeds.
        seeds: Number of seeds.
    """

    network: str
    bits: str
    drop: float
    seeds: int

    def __str__(self) -> str:
        return f"{self.drop:.1f} points on {self.network}"


def measured_drops(bits: Bits) -> Iterator[MeasuredDrop]:
    """Yield the measured drops at these bits, in the order of the file."""
    text = files("gdfq.analysis").joinpath("measured.json").read_text(encoding="utf-8")
    for values in json.loads(text):
        if values["bits"] == str(bits):
            yield MeasuredDrop(**values)
