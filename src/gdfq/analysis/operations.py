"""Multiply-accumulates of layers and matrix products, counted from the graph."""

import math

from torch import Tensor, fx

from gdfq.functional.grid import Layout
from gdfq.graph import operators, queries


def layer_operations(node: fx.Node, weight: Tensor) -> int:
    """Multiply-accumulates of a convolution or linear layer per image, padding included."""
    layout, _ = queries.weight_layout(node)
    # Each output of a layer, and each input of a transposed convolution, is multiplied by the
    # other dimensions of the weight.
    counted = node if layout is Layout.ROWS else queries.input_of(node)
    return queries.elements_per_image(counted) * math.prod(weight.shape[1:])


def product_operations(node: fx.Node) -> int:
    """Multiply-accumulates of a matrix product of two activations per image; else 0."""
    if operators.name_of(node) not in operators.PRODUCTS:
        return 0
    left = queries.input_of(node)
    return queries.elements_per_image(node) * int(left.meta["val"].shape[-1])
