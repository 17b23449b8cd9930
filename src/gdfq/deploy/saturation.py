"""What integer runtimes make of a frozen network: which sums may overflow their kernels."""

from typing import Any

from torch import fx

from gdfq.graph import operators, queries
from gdfq.graph.tensors import tensors_of

_SAFE_PRODUCT = 2**15 - 1
"""What two neighbouring products may add up to in 16 bits, on processors without VNNI."""


def layers_that_may_overflow(network: fx.GraphModule) -> list[str]:
    """Layers whose kernels may saturate on x86 processors without VNNI, by their codes' names.

    Those add two products of unsigned activations and signed weights in 16 bits.
    """
    tensors = tensors_of(network)
    found = []
    for node in network.graph.nodes:
        quantizer = activation_of(node)
        if quantizer is None:
            continue
        codes, _, zero_point, _ = _arguments(_arguments(node)[1])
        bits = _arguments(quantizer)[3]
        reach = (tensors[codes.target].float() - tensors[zero_point.target]).abs().max()
        if 2 * (2**bits - 1) * float(reach) > _SAFE_PRODUCT:
            found.append(str(codes.target))
    return found


def activation_of(node: fx.Node) -> fx.Node | None:
    """The quantizer whose codes a layer multiplies by its weights' codes, or None."""
    if operators.name_of(node) not in operators.WEIGHTED:
        return None
    x, weight, *_ = _arguments(node)
    if operators.name_of(weight) != "gdfq.dequantize":
        return None
    source = queries.grid_source(x)
    return source if operators.name_of(source) == "gdfq.fake_quantize" else None


def _arguments(node: fx.Node) -> tuple[Any, ...]:
    return node.args
