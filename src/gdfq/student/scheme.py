"""Schemes: what is quantized, and to how many bits."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from glob import escape
from typing import Literal

from torch import fx

from gdfq.errors import UsageError, warn_renamed
from gdfq.files.plain_values import tagged
from gdfq.functional.float_grid import ALL_FORMATS, NumberFormat, formats_of
from gdfq.functional.grid import (
    FLOAT_BITS,
    MAX_BITS,
    MIN_BITS,
    UNROUNDED,
    UNSATURATED_BITS,
    Bits,
)
from gdfq.graph import queries
from gdfq.graph.capture import Captured
from gdfq.student.narrow import narrow_layers

Placement = Literal["relu", "full", "tokens"]
PLACEMENTS: tuple[Placement, ...] = ("relu", "full", "tokens")
OF_IMAGES: tuple[Placement, ...] = ("relu", "full")
"""Placements of networks that are no language models."""
_OLD_RELU = "t1"

_ENDS = ("first", "last")
_NARROW = "narrow"
_NO_NAMES = (*_ENDS, _NARROW)
"""Patterns that are positions or a kind of layer rather than names."""


def parse_placement(text: str) -> Placement:
    """Read a placement; the old spelling "t1" of "relu" is accepted with a warning.

    Raises:
        UsageError: There is no such placement.
    """
    if text == _OLD_RELU:
        warn_renamed("placement 't1'", "'relu'")
        return "relu"
    for known in PLACEMENTS:
        if text == known:
            return known
    raise UsageError(f"placement must be one of {', '.join(PLACEMENTS)}; got {text!r}.")


@dataclass(frozen=True)
class LayerBits:
    """The bits of some layers, and of the activations that only enter these.

    Attributes:
        pattern: An `fnmatch` pattern for the names of layers' modules; or `first` or `last`; or
            `narrow` for all narrow layers (`gdfq.student.narrow`); a network may have none.
        bits: 2..8, or None for float. The grids are integer or floating-point ones as those of all
            other layers.
    """

    pattern: str
    bits: int | None

    @classmethod
    def parse(cls, text: str) -> "LayerBits":
        """Read text such as `stage1.*=8` or `last=float`.

        Raises:
            UsageError: The text has another form.
        """
        pattern, _, bits = text.rpartition("=")
        if pattern and bits == "float":
            return cls(pattern, None)
        if pattern and bits in map(str, range(MIN_BITS, MAX_BITS + 1)):
            return cls(pattern, int(bits))
        raise UsageError(
            "the bits of layers are written PATTERN=BITS with 2..8 bits, or PATTERN=float, as "
            f"'stage1.*=float' or last=8; got {text!r}."
        )

    @classmethod
    def exactly(cls, name: str, bits: int) -> "LayerBits":
        """Return the bits of the one layer of this name, which may contain wildcard characters."""
        pattern = escape(name)
        return cls(f"[{name[0]}]{name[1:]}" if name in _NO_NAMES else pattern, bits)

    def __str__(self) -> str:
        return f"{self.pattern}={'float' if self.bits is None else self.bits}"

    def matches(self, name: str, index: int, count: int, *, narrow: bool = False) -> bool:
        """Return whether the pattern matches layer number `index` of `count`."""
        if self.pattern == _NARROW:
            return narrow
        if self.pattern in _ENDS:
            return index == (0 if self.pattern == "first" else count - 1)
        return fnmatchcase(name, self.pattern)


_FEWEST_BITS_OF_ENDS = 3
"""Fewest bits of weights and activations with which the first and the last layer have them, too."""


def with_default_layer_bits(
    layer_bits: Sequence[LayerBits], bits: Bits, placement: Placement
) -> tuple[LayerBits, ...]:
    """Return the bits of layers with those that some layers have by default.

    In a deployable network (placement "full") narrow layers have 7 bits (`gdfq.student.narrow`).
    With 2 bits of weights or activations the first and the last layer have 7 bits, too: they hold
    few of the weights, and their rounding makes up a ninth of the divergence of a ResNet-20. With 7
    bits no kernel saturates (`functional.grid.weight_grid`). They have 8 bits where other weights
    have 8, or where grids are floating-point. The last layer of a language model, its head, stays
    float with any bits. What the user says about these layers counts. The published protocol has
    the same bits everywhere.

    Args:
        layer_bits: The layers with other bits, as the user says.
        bits: Bits of all other layers.
        placement: Where activations are quantized.
    """
    fewest = min(bits.weights, bits.activations)
    defaults: list[LayerBits] = []
    if placement == "tokens":
        defaults = [LayerBits("last", None)]
    elif placement == "full" and fewest < MAX_BITS:
        ends = _ENDS if fewest < _FEWEST_BITS_OF_ENDS else ()
        may_saturate = bits.weights == MAX_BITS or bits.float_weights
        more = MAX_BITS if may_saturate or bits.float_activations else UNSATURATED_BITS
        defaults = [LayerBits(pattern, more) for pattern in (*ends, _NARROW)]
    said = {layers.pattern for layers in layer_bits}
    return (*layer_bits, *(layers for layers in defaults if layers.pattern not in said))


@tagged("GridRules", added={"formats": ALL_FORMATS})
@dataclass(frozen=True)
class GridRules:
    """What grids must fulfil beside their bits. A target sets it for its runtime.

    Attributes:
        symmetric_weights: Zero points of weights are 0.
        symmetric_activations: Zero points of activations are 0 in signed codes. Values above 0
            alone, as behind a ReLU, then have half of the codes.
        one_grid_for_joins: The inputs of a concatenation and its result have one grid, of the most
            bits of any of them.
        formats: The formats that floating-point grids may have.
    """

    symmetric_weights: bool = False
    symmetric_activations: bool = False
    one_grid_for_joins: bool = False
    formats: tuple[NumberFormat, ...] = ALL_FORMATS


@dataclass(frozen=True)
class Scheme:
    """What is quantized, and to how many bits.

    Attributes:
        bits: Bits of weights and activations.
        placement: "relu" (the protocol of the published tables): all weights; of the activations
            only the outputs of ReLUs. "full" (deployable): all weights, and every tensor that
            enters a convolution, linear layer, addition, multiplication, concatenation or pooling,
            and every convolution or linear output without a ReLU; the network's outputs stay float.
            Activations have 8 bits where they are only carried (`gdfq.student.placement`).
            "tokens" (language models): the weights of linear layers and what enters these, with a
            symmetric scale for each token that is found where it is computed.
        layer_bits: Layers with other bits; the first that matches a layer counts.
        grids: What grids must fulfil beside their bits.
        denoiser: Whether the network is the denoiser of a diffusion model. Then what is computed
            from scalars alone stays float (the embedding of the time step), and the image that
            enters: at the end of a trajectory its noise is smaller than a step of an 8-bit grid.
        group_size: Most columns of a weight that share a scale, in placement "tokens"; None for one
            scale an output channel.
        new_biases: Whether layers without a bias may learn one.
        narrow: Names of the narrow layers of the network.

    Raises:
        UsageError: The parts do not go together.
    """

    bits: Bits
    placement: Placement
    layer_bits: tuple[LayerBits, ...] = ()
    grids: GridRules = GridRules()
    denoiser: bool = False
    group_size: int | None = None
    new_biases: bool = True
    narrow: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._check_placement()
        if not (self.bits.float_weights or self.bits.float_activations):
            return
        for override in self.layer_bits:
            if override.bits not in (None, *FLOAT_BITS):
                raise UsageError(
                    f"layers have 4 or 8 bits, or float, beside the floating-point grids of "
                    f"{self.bits}; got {override}. Write for instance {override.pattern}=8."
                )

    def _check_placement(self) -> None:
        if self.placement == "tokens":
            if self.bits.float_weights or self.bits.float_activations:
                raise UsageError(
                    "language models have integer grids, or activations that stay float; got "
                    f"{self.bits}. Use for instance w4a4, w4a8, w8a8 or w4a16."
                )
            if self.group_size is not None and self.group_size < 2:
                raise UsageError(f"a group needs two columns or more; got {self.group_size}.")
        elif self.bits.activations == UNROUNDED or self.group_size is not None:
            grouped = self.group_size is not None
            what = "groups of columns" if grouped else "activations of 16 bits"
            raise UsageError(
                f"{what} are for language models, with recipe 'text'; the placement is "
                f"{self.placement!r}. Use for instance w4a8{' without a group size' * grouped}."
            )

    def weight_formats(self, bits: int) -> tuple[NumberFormat, ...] | None:
        """Return the formats that weights of so many bits may have; None for integer grids."""
        is_float = self.bits.float_weights
        return formats_of(bits, self.grids.formats, signed=True) if is_float else None

    def activation_formats(self, bits: int) -> tuple[NumberFormat, ...] | None:
        """Return the formats that activations of so many bits may have; None for integer grids."""
        return formats_of(bits, self.grids.formats) if self.bits.float_activations else None

    def for_network(self, teacher: Captured) -> "Scheme":
        """Return the scheme with the narrow layers of a network, or without bits for them."""
        narrow = tuple(narrow_layers(teacher))
        said = self.layer_bits
        kept = said if narrow else tuple(part for part in said if part.pattern != _NARROW)
        return replace(self, layer_bits=kept, narrow=narrow)

    def overridden(self, layers: Sequence[fx.Node]) -> dict[fx.Node, LayerBits]:
        """Return the layers with other bits, and these bits.

        Raises:
            UsageError: A pattern matches no layer.
        """
        names = [queries.layer_name(layer) for layer in layers]
        floats = self.float_nodes(layers[0].graph) if layers else set()
        # The first layer is the first of those that are quantized: no embedding of a time step.
        ordered = [layer for layer in layers if layer not in floats]
        places = {layer: place for place, layer in enumerate(ordered)}

        def matches(override: LayerBits, layer: fx.Node, name: str) -> bool:
            place, narrow = places.get(layer, -1), name in self.narrow
            return override.matches(name, place, len(ordered), narrow=narrow)

        for override in self.layer_bits:
            if not any(map(partial(matches, override), layers, names)):
                raise UsageError(
                    "layer_bits must name layers of the network, or be first, last or narrow; "
                    f"{override.pattern!r} matches none of: {', '.join(names)}."
                )
        chosen = {}
        for layer, name in zip(layers, names, strict=True):
            matching = [o for o in self.layer_bits if matches(o, layer, name)]
            if matching:
                chosen[layer] = matching[0]
        return chosen

    def float_nodes(self, graph: fx.Graph) -> set[fx.Node]:
        """Return what stays float in a denoiser, unless the bits of its layers are named."""
        return queries.computed_from_scalars(graph) if self.denoiser else set()

    def weight_bits(self, layers: Sequence[fx.Node]) -> dict[fx.Node, int]:
        """Return the bits of each layer's weight; layers that stay float are left out.

        Raises:
            UsageError: A pattern matches no layer.
        """
        overridden = self.overridden(layers)
        floats = self.float_nodes(layers[0].graph) if layers else set()
        found = {
            layer: overridden[layer].bits
            if layer in overridden
            else (None if layer in floats else self.bits.weights)
            for layer in layers
        }
        return {layer: bits for layer, bits in found.items() if bits is not None}
