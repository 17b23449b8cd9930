"""The type of the fixture `digits`."""

from dataclasses import dataclass
from pathlib import Path

from gdfq import demo


@dataclass(frozen=True)
class TrainedDigits:
    """A network that reads digits, the file of its weights, and the halves of the images."""

    weights: Path
    network: demo.DigitsNetwork
    training: demo.Digits
    held_out: demo.Digits
