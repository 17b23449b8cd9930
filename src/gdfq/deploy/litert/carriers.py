"""How a `.tflite` file stores the codes of activations: as int8, whatever their bits."""

from dataclasses import dataclass

from gdfq.deploy.litert.flatbuffer import Grid
from gdfq.functional.grid import MAX_BITS, code_bounds
from gdfq.student.integer_network import ActivationGrid, IntegerNetwork

_, HIGHEST = code_bounds(MAX_BITS)
"""The highest int8 number."""


@dataclass(frozen=True)
class StoredCodes:
    """The codes of an activation in a file.

    Codes of k < 8 bits are stored as the highest 2^k of int8: 112 to 127 for 4 bits. So they
    saturate at the highest by themselves. Numbers below the lowest must be clipped.
    """

    name: str
    """Name of the tensor."""
    lowest: int
    """What is stored for the lowest code."""
    grid: Grid
    bits: int

    @property
    def scale(self) -> float:
        return self.grid.scales[0]

    @property
    def low(self) -> float:
        """The number that the lowest code stands for."""
        return (self.lowest - self.grid.zero_point) * self.scale

    @property
    def starts_at_zero(self) -> bool:
        """Return whether the lowest code stands for 0, so that a ReLU clips below it."""
        return self.lowest == self.grid.zero_point

    @property
    def saturates(self) -> bool:
        """Return whether int8 also saturates at the lowest code."""
        return self.bits == MAX_BITS


def carrier_of(grid: ActivationGrid) -> StoredCodes:
    """Return how a file stores the codes of an activation."""
    lowest_code, highest_code = code_bounds(grid.bits)
    shift = HIGHEST - highest_code
    stored = Grid((float(grid.scale),), int(grid.zero_point) + shift)
    return StoredCodes(f"{grid.name}.q", lowest_code + shift, stored, grid.bits)


def carriers_of(network: IntegerNetwork) -> dict[str, StoredCodes]:
    """Return how a file stores the codes of each activation, by the name of its grid."""
    return {grid.name: carrier_of(grid) for grid in network.activations}
