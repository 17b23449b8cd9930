"""The card of a quantized network."""

from dataclasses import dataclass

from gdfq.data.preprocessing import Preprocessing
from gdfq.files.plain_values import tagged
from gdfq.functional.grid import Bits
from gdfq.graph.outputs import Structure
from gdfq.student.scheme import Placement
from gdfq.version import __version__


@tagged("Card", renamed={"layer_bits": "keep"}, spellings={"relu": "t1"})
@dataclass(frozen=True)
class Card:
    """What a user of the network must know to use it."""

    input_shape: tuple[int, ...]
    classes: int | None
    """Of a classifier; None for a network whose outputs are not classes."""
    outputs: Structure
    preprocessing: Preprocessing
    bits: Bits
    placement: Placement
    recipe: str
    seed: int
    keep: tuple[str, ...] = ()
    gdfq_version: str = __version__
