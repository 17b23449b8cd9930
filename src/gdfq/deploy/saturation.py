"""Saturation: layers whose 16-bit sums may overflow in kernels of integer runtimes."""

from gdfq.student.integer_network import IntegerNetwork

_SAFE_PRODUCT = 2**15 - 1
"""Largest 16-bit sum of two adjacent products, on processors without VNNI."""


def layers_that_may_overflow(network: IntegerNetwork) -> list[str]:
    """Return layers that may saturate on x86 processors without VNNI, by their codes' names.

    Kernels there add two products of unsigned activations and signed weights in 16 bits.
    """
    found = []
    for layer in network.layers:
        weight, entering = layer.weight, layer.input
        if weight is None or entering is None:
            continue
        reach = float((weight.codes.float() - weight.zero_point).abs().max())
        if 2 * (2**entering.bits - 1) * reach > _SAFE_PRODUCT:
            found.append(weight.codes_name)
    return found


def without_overflow(network: IntegerNetwork) -> IntegerNetwork:
    """Return the network with one bit less for the weights of `layers_that_may_overflow`."""
    bits = network.code_bits()
    return network.with_bits({name: bits[name] - 1 for name in layers_that_may_overflow(network)})
