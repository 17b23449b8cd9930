"""Saturation: layers whose 16-bit sums may overflow in kernels of integer runtimes."""

from gdfq.functional.grid import code_bounds
from gdfq.student.integer_network import IntegerLayer, IntegerNetwork

_SAFE_PRODUCT = 2**15 - 1
"""Largest 16-bit sum of two adjacent products, on processors without VNNI."""
TOKEN_OFFSET = 128
"""What is added to the codes of tokens for integer kernels, whose first factor is unsigned."""


def layers_that_may_overflow(network: IntegerNetwork) -> list[str]:
    """Return layers that may saturate on x86 processors without VNNI, by their codes' names."""
    return [
        layer.weight.codes_name
        for layer in network.layers
        if layer.weight is not None and may_overflow(layer, _highest(layer))
    ]


def _highest(layer: IntegerLayer) -> int:
    """Return the highest unsigned code of a layer's input in integer kernels; 0 for floats."""
    if layer.token_bits is not None:
        has_blocks = layer.weight is not None and layer.weight.scale.shape[1] > 1
        return 0 if has_blocks else TOKEN_OFFSET + code_bounds(layer.token_bits)[1]
    if layer.input is None or layer.input.form is not None:
        return 0
    highest: int = 2**layer.input.bits - 1
    return highest


def may_overflow(layer: IntegerLayer, highest: int) -> bool:
    """Return whether a layer may saturate for unsigned codes of its input up to `highest`.

    Kernels of x86 processors without VNNI add two products of unsigned activations and signed
    weights in 16 bits.
    """
    if layer.weight is None or layer.weight.form is not None:
        return False
    return 2 * highest * layer.weight.reach > _SAFE_PRODUCT


def without_overflow(network: IntegerNetwork) -> IntegerNetwork:
    """Return the network with one bit less for the weights of `layers_that_may_overflow`."""
    bits = network.code_bits()
    return network.with_bits({name: bits[name] - 1 for name in layers_that_may_overflow(network)})
