"""Which quantizer each weight and each activation of a student gets."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor, fx, nn

from gdfq.errors import UsageError
from gdfq.functional.grid import MAX_BITS, UNSATURATED_BITS, Bits, Layout
from gdfq.graph import queries
from gdfq.graph.capture import Captured
from gdfq.graph.tensors import tensors_of
from gdfq.quantizers.base import ActivationQuantizer, WeightQuantizer
from gdfq.quantizers.family import QuantizerFamily
from gdfq.student.placement import activation_bits, joined_groups, layer_input_bits
from gdfq.student.scheme import Scheme

_REACH = 1.2
"""How far grids of activations reach where weights have 7 or 8 bits, of the range of the images
that they were found from. Other images have larger values, and a coarser step then costs less than
to clip them; with weights of 4 bits it does not (docs/research/round-15-reach.md)."""
_BITS_WITH_REACH = frozenset({Bits(MAX_BITS, MAX_BITS), Bits(UNSATURATED_BITS, MAX_BITS)})


@dataclass(frozen=True, eq=False)
class BitsByNode:
    """The bits of what a scheme quantizes, by nodes of the teacher.

    Attributes:
        activations: Of activations.
        layer_inputs: Of activations that are rounded again where they enter layers.
        weights: Of weights, by their layers.
    """

    activations: Mapping[fx.Node, int]
    layer_inputs: Mapping[fx.Node, int]
    weights: Mapping[fx.Node, int]

    @classmethod
    def of(cls, teacher: Captured, scheme: Scheme) -> "BitsByNode":
        return cls(
            activations=activation_bits(teacher, scheme),
            layer_inputs=layer_input_bits(teacher, scheme),
            weights=scheme.weight_bits(queries.weighted_layers(teacher.network)),
        )


class AssignedQuantizers:
    """The quantizers of a student: those that share a weight or a grid are the same one."""

    def __init__(
        self, teacher: Captured, scheme: Scheme, family: QuantizerFamily, bits: BitsByNode
    ) -> None:
        self._teacher, self._scheme, self._bits = teacher, scheme, bits
        self._by_token = family.tokens
        self._make_weight = _weight_quantizers(scheme, family)
        self._make_activation = _activation_quantizers(scheme, family)
        self._tensors = tensors_of(teacher.network)
        self._weights: dict[tuple[object, ...], WeightQuantizer] = {}
        self._groups = _shared_grids(teacher, scheme, bits.activations)
        self._shared: dict[fx.Node, ActivationQuantizer] = {}

    def of_weight(self, layer: fx.Node) -> WeightQuantizer:
        """Return the quantizer of a layer's weight."""
        layout, bits = queries.weight_layout(layer), self._bits.weights[layer]
        weight = self._tensors[queries.weight_name(layer)]
        # A weight that is used twice is one, unless its channels lie along another dimension.
        key = (id(weight), bits, *layout)
        if key not in self._weights:
            self._weights[key] = self._make_weight(weight, bits, *layout)
        return self._weights[key]

    def of_activation(self, node: fx.Node) -> ActivationQuantizer:
        """Return the quantizer of an activation: its own, or that of its group."""
        bits = self._bits.activations[node]
        if node not in self._groups:
            made = self._activation(node, bits)
            if node.op == "placeholder":
                made.known_range = _range_of_inputs(self._teacher)
            return made
        group = self._groups[node]
        if group[0] not in self._shared:
            made = self._shared[group[0]] = self._activation(node, bits)
            lows, highs = zip(*map(queries.value_limits, group), strict=True)
            made.limits = min(lows), max(highs)
        return self._shared[group[0]]

    def of_layer_input(self, source: fx.Node) -> nn.Module:
        """Return the quantizer of what enters layers from a node."""
        bits = self._bits.layer_inputs[source]
        return self._by_token(bits) if self._by_token else self._activation(source, bits)

    def _activation(self, node: fx.Node, bits: int) -> ActivationQuantizer:
        made = self._make_activation(bits)
        made.symmetric = self._scheme.grids.symmetric_activations
        made.limits = queries.value_limits(node)
        made.reach = _REACH if self._scheme.bits in _BITS_WITH_REACH else 1.0
        return made


def _shared_grids(
    teacher: Captured, scheme: Scheme, bits_of: Mapping[fx.Node, int]
) -> dict[fx.Node, list[fx.Node]]:
    """Return the groups of activations with one grid, by each activation of them."""
    if not scheme.grids.one_grid_for_joins:
        return {}
    groups = joined_groups(list(teacher.network.graph.nodes), bits_of)
    return {node: group for group in groups for node in group}


def _weight_quantizers(
    scheme: Scheme, quantizers: QuantizerFamily
) -> Callable[[Tensor, int, Layout, int], WeightQuantizer]:
    """Return what makes the weight quantizers of a scheme.

    Raises:
        UsageError: The family has no symmetric ones, or none with floating-point grids.
    """
    if scheme.group_size is not None and quantizers.blocks is not None:
        return partial(quantizers.blocks, block=scheme.group_size)
    if scheme.bits.float_weights:
        make = quantizers.float_weight
        if make is None:
            raise _without_float_grids(scheme, quantizers)
        return lambda weight, bits, layout, groups: make(
            weight, bits, layout, groups, forms=scheme.weight_formats(bits) or ()
        )
    if not scheme.grids.symmetric_weights:
        return quantizers.weight
    if quantizers.symmetric_weight is None:
        raise UsageError(
            "a scheme with symmetric weights needs quantizers whose zero points are 0; the family "
            f"{quantizers.name!r} has no symmetric_weight. Use another recipe or target."
        )
    return quantizers.symmetric_weight


def _activation_quantizers(
    scheme: Scheme, quantizers: QuantizerFamily
) -> Callable[[int], ActivationQuantizer]:
    """Return what makes the activation quantizers of a scheme.

    Raises:
        UsageError: The family has none with floating-point grids.
    """
    if not scheme.bits.float_activations:
        return quantizers.activation
    make = quantizers.float_activation
    if make is None:
        raise _without_float_grids(scheme, quantizers)
    return lambda bits: make(bits, forms=scheme.activation_formats(bits) or ())


def _without_float_grids(scheme: Scheme, quantizers: QuantizerFamily) -> UsageError:
    return UsageError(
        f"bits {scheme.bits} need quantizers with floating-point grids; the family "
        f"{quantizers.name!r} has none. Use a recipe that learns its grids, such as fast."
    )


def _range_of_inputs(teacher: Captured) -> tuple[float, float] | None:
    """Return the lowest and the highest value of the images, where they are known."""
    if teacher.input_limits is None:
        return None
    lows, highs = zip(*teacher.input_limits, strict=True)
    return min(0.0, *lows), max(0.0, *highs)


def check_quantizable(teacher: Captured, scheme: Scheme, bits: BitsByNode) -> None:
    """Check that a network has what a scheme quantizes.

    Raises:
        UsageError: The scheme finds no weight or no activation, or the bias of a layer is computed.
    """
    if not bits.weights:
        raise UsageError(
            "there must be a convolution or linear layer to quantize; this network has none"
            f"{' but those that stay float' if scheme.layer_bits else ''}."
        )
    if not bits.activations and scheme.placement != "tokens":
        raise UsageError(
            f"placement {scheme.placement!r} quantizes the outputs of ReLUs, of which this network "
            "has none to quantize: its activations would stay float. Use placement 'full'."
        )
    for node in queries.weighted_layers(teacher.network):
        bias = queries.bias_of(node)
        if bias is not None and bias.op != "get_attr":
            raise UsageError(
                f"a layer's bias must be a tensor of the network; that of {node.name} is computed "
                "from the input. Add it after the layer instead."
            )


def check_family(scheme: Scheme, quantizers: QuantizerFamily) -> None:
    """Check that a family has the quantizers that a scheme needs.

    Raises:
        UsageError: It has none with zero points of 0, none with floating-point grids, or none for
            the placement.
    """
    if (scheme.placement == "tokens") != (quantizers.tokens is not None):
        which = "for language models" if quantizers.tokens else "not for language models"
        raise UsageError(
            f"language models have placement 'tokens', and no other network has; the placement is "
            f"{scheme.placement!r}, and the quantizers of the recipe are {which}. Use recipe "
            "'text' for a language model, and any other recipe for other networks."
        )
    _weight_quantizers(scheme, quantizers)
    _activation_quantizers(scheme, quantizers)


def check_scheme(teacher: Captured, scheme: Scheme, quantizers: QuantizerFamily) -> None:
    """Raise the errors of `build_student`, without a search for grids."""
    check_family(scheme, quantizers)
    teacher = quantizers.prepared(teacher)
    check_quantizable(teacher, scheme, BitsByNode.of(teacher, scheme))
