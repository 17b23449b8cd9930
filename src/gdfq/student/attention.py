"""What of attention, and of pooling by attention, stays float in `full` placement.

Scores stay float up to their softmax, because ONNX Runtime computes in float there. The weights of
a softmax over many positions, and more so their products with features, are tiny against the
largest value that a grid for all images must hold: most codes would be 0, 1 or 2. Matrix products,
which sum over the positions in integers, read quantized weights all the same: their rounding errors
average out. Elementwise products and their sums stay float; no integer kernel is lost, because
runtimes compute such sums, and quotients, in float.
"""

from torch import fx

from gdfq.graph import operators, queries


def stays_float(node: fx.Node) -> bool:
    """Return whether a node that could read integers reads floats instead."""
    return (
        feeds_softmax_only(node)
        or queries.divides_by_activation(node)
        or _reads_weights_of_positions(node)
    )


def gives_scores(node: fx.Node) -> bool:
    """Return whether only a softmax reads a node, also scaled, masked or moved."""
    return bool(node.users) and all(
        operators.name_of(user) in operators.SOFTMAX or feeds_softmax_only(user)
        for user in node.users
    )


def feeds_softmax_only(node: fx.Node) -> bool:
    """Return whether a node scales, masks or moves attention scores that only a softmax reads."""
    if operators.name_of(node) not in operators.AFFINE and not queries.keeps_grid(node):
        return False
    return not _joins_activations(node) and gives_scores(node)


def _reads_weights_of_positions(node: fx.Node) -> bool:
    """Return whether a node multiplies, scales or sums weights of positions."""
    name = operators.name_of(node)
    multiplies = name in operators.ELEMENTWISE_PRODUCTS or _is_scaling(node)
    return (multiplies or name in operators.POOLING) and any(
        _holds_weights_of_positions(source) for source in node.all_input_nodes
    )


def _holds_weights_of_positions(node: fx.Node) -> bool:
    """Return whether a node is a softmax, also one that is written out, or made of one.

    Products, quotients, sums and rectified values of weights count, too.
    """
    node = queries.grid_source(node)
    name = operators.name_of(node)
    if name in operators.SOFTMAX or name == operators.EXPONENTIAL:
        return True
    passes_on = (
        name in operators.ELEMENTWISE_PRODUCTS | operators.MEANS
        or _is_scaling(node)
        or queries.divides_by_activation(node)
        or queries.is_rectifier(node)
    )
    return passes_on and any(map(_holds_weights_of_positions, node.all_input_nodes))


def _is_scaling(node: fx.Node) -> bool:
    """Return whether a node scales or shifts an activation by constants."""
    return operators.name_of(node) in operators.AFFINE and not _joins_activations(node)


def _joins_activations(node: fx.Node) -> bool:
    return sum(map(queries.is_activation, node.all_input_nodes)) > 1
