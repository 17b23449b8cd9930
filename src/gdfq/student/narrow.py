"""Narrow layers: those that lose most by rounding and hold few of the weights."""

from itertools import accumulate

from gdfq.graph import operators, queries
from gdfq.graph.capture import Captured
from gdfq.graph.tensors import tensors_of

_NARROW_PRODUCTS = 32
"""Most products that an output of a narrow layer sums; that of a depthwise layer may sum more."""
_NARROW_SHARE = 1 / 16
"""Most of the weights of a network that its narrow layers hold."""


def narrow_layers(teacher: Captured) -> list[str]:
    """Return the names of the narrow layers of a network, those of fewest weights first.

    They are the depthwise convolutions, and other convolutions of few input channels, each of whose
    outputs is a sum of few products. Few weights can hardly make up for one another's rounding, and
    what such layers lose is lost for all layers after them. A layer of the network's inputs is none
    of them: pixels have 8 bits anyway. Narrow layers hold few of the weights: the largest ones are
    left out where all together hold more than a sixteenth, so that a byte in place of 4 bits makes
    the weights larger by a sixteenth at most.
    """
    tensors = tensors_of(teacher.network)
    calls = reversed(queries.weighted_layers(teacher.network))
    layers = {queries.weight_name(layer): layer for layer in calls}  # the first call of each
    weights = {name: tensors[name] for name in layers}
    few = sorted(
        (weights[name].numel(), queries.layer_name(layer))
        for name, layer in layers.items()
        if operators.name_of(layer) in operators.CONVOLUTIONS
        and queries.input_of(layer).op != "placeholder"
        and (queries.is_depthwise(layer) or weights[name][0].numel() <= _NARROW_PRODUCTS)
    )
    most = _NARROW_SHARE * sum(weight.numel() for weight in weights.values())
    held = accumulate(count for count, _ in few)
    return [name for (_, name), together in zip(few, held, strict=True) if together <= most]
