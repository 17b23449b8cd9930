"""What is quantized, and to how many bits: a value that a user writes."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from glob import escape
from typing import Literal

from torch import fx

from gdfq.errors import UsageError
from gdfq.functional.grid import MAX_BITS, MIN_BITS, Bits
from gdfq.graph import queries

Placement = Literal["t1", "full"]
PLACEMENTS: tuple[Placement, ...] = ("t1", "full")

_PLACES = ("first", "last")
"""Patterns that are places in the network rather than names."""


@dataclass(frozen=True)
class Keep:
    """Layers that are kept at another width, with the activations that enter them alone.

    pattern: of the names of layers' modules, as `fnmatch` has it, or `first` or `last`.
    bits: 2..8, or None for float.
    """

    pattern: str
    bits: int | None

    @classmethod
    def parse(cls, text: str) -> "Keep":
        """Read `stage1.*=8` or `last=float`. Raises UsageError for anything else."""
        pattern, _, width = text.rpartition("=")
        if pattern and width == "float":
            return cls(pattern, None)
        if pattern and width in map(str, range(MIN_BITS, MAX_BITS + 1)):
            return cls(pattern, int(width))
        raise UsageError(
            "what is kept is written PATTERN=float, or PATTERN=BITS with 2..8 bits, as "
            f"'stage1.*=float' or last=8; got {text!r}."
        )

    @classmethod
    def exactly(cls, name: str, bits: int) -> "Keep":
        """That layer alone, whatever its name is."""
        pattern = escape(name)
        return cls(f"[{name[0]}]{name[1:]}" if name in _PLACES else pattern, bits)

    def __str__(self) -> str:
        return f"{self.pattern}={'float' if self.bits is None else self.bits}"

    def fits(self, name: str, index: int, count: int) -> bool:
        """Whether a layer is meant: its name, and which of how many it is."""
        if self.pattern in _PLACES:
            return index == (0 if self.pattern == "first" else count - 1)
        return fnmatchcase(name, self.pattern)


@dataclass(frozen=True)
class Scheme:
    """What is quantized, and to how many bits.

    placement "t1" (the protocol of the published tables): all weights; of the activations only
    the outputs of ReLUs. "full" (deployable): all weights, and every tensor that enters a
    convolution, linear layer, addition, multiplication, concatenation or pooling, and every
    convolution or linear output without a ReLU; the network's outputs stay float.
    keep: layers of another width; the first that fits a layer counts.
    """

    bits: Bits
    placement: Placement
    keep: tuple[Keep, ...] = ()

    def kept(self, layers: Sequence[fx.Node]) -> dict[fx.Node, Keep]:
        """The layers that are kept at another width, and what says so.

        Raises UsageError for a pattern that fits no layer.
        """
        names = [queries.layer_name(layer) for layer in layers]
        for keep in self.keep:
            if not any(keep.fits(name, index, len(names)) for index, name in enumerate(names)):
                raise UsageError(
                    "keep must name layers of the network, or be first or last; "
                    f"{keep.pattern!r} fits none of: {', '.join(names)}."
                )
        chosen = {}
        for index, (layer, name) in enumerate(zip(layers, names, strict=True)):
            fitting = [keep for keep in self.keep if keep.fits(name, index, len(names))]
            if fitting:
                chosen[layer] = fitting[0]
        return chosen

    def weight_bits(self, layers: Sequence[fx.Node]) -> dict[fx.Node, int]:
        """The width of each layer's weight; layers that stay float have none.

        Raises UsageError for a pattern that fits no layer.
        """
        kept = self.kept(layers)
        widths = {
            layer: kept[layer].bits if layer in kept else self.bits.weights for layer in layers
        }
        return {layer: bits for layer, bits in widths.items() if bits is not None}
