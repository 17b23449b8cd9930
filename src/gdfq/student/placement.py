"""Which activations of a network a scheme quantizes."""

from collections.abc import Collection, Sequence

from torch import fx

from gdfq.functional.grid import UNROUNDED
from gdfq.graph import operators, queries
from gdfq.graph.batch_norms import batch_norm_after
from gdfq.graph.capture import Captured
from gdfq.student.attention import gives_scores, stays_float
from gdfq.student.scheme import Scheme

_CARRIED_BITS = 8
"""Bits, in `full` placement, of what is only carried: the network's input, what layers return
without a ReLU or with one that no integer kernel reads, and residual paths (what enters sums and
concatenations)."""


def activation_bits(teacher: Captured, scheme: Scheme) -> dict[fx.Node, int]:
    """Return the nodes of the teacher whose outputs are quantized, and to how many bits.

    An output that enters layers as well as sums may be rounded again, to fewer bits, on its way
    into the layers (`layer_input_bits`), which is all that language models round.
    """
    if scheme.placement == "tokens":
        return {}
    nodes = list(teacher.network.graph.nodes)
    layers = list(filter(queries.has_weight, nodes))
    weight_bits = scheme.weight_bits(layers)
    bits_of = dict.fromkeys(layers, None) | weight_bits
    kept = {layer: bits for layer, bits in bits_of.items() if bits != scheme.bits.weights}
    if scheme.placement == "relu":
        found = {n: scheme.bits.activations for n in nodes if queries.is_rectifier(n)}
    else:
        found = _full_placement(nodes, scheme, floats=set(layers) - set(weight_bits))
    if scheme.denoiser:
        floats = _input_signals(nodes) | {
            node
            for node in scheme.float_nodes(teacher.network.graph)
            if not any(layer in weight_bits for layer in _entered(node))
        }
        found = {node: bits for node, bits in found.items() if node not in floats}
    for node in list(found):
        entered = _entered(node)
        if entered and all(layer in kept for layer in entered):
            reader_bits = [kept[layer] for layer in entered]
            if all(bits is None for bits in reader_bits):
                del found[node]
            elif None not in reader_bits:
                found[node] = max(found[node], *(bits for bits in reader_bits if bits is not None))
    if scheme.grids.one_grid_for_joins:
        for group in joined_groups(nodes, found):
            found |= dict.fromkeys(group, max(found[node] for node in group))
    return found


def joined_groups(nodes: Sequence[fx.Node], quantized: Collection[fx.Node]) -> list[list[fx.Node]]:
    """Return the activations that share a grid if a concatenation and its inputs have one.

    Args:
        nodes: The nodes of a network, in order.
        quantized: Those whose outputs are quantized.

    Returns:
        Groups of two activations or more, each in the order of the network.
    """
    groups = {node: [node] for node in nodes if node in quantized}
    for node in nodes:
        if operators.name_of(node) not in operators.JOINS:
            continue
        sources = filter(queries.is_activation, node.all_input_nodes)
        joined = [groups[s] for s in (*map(queries.grid_source, sources), node) if s in groups]
        members = {member for group in joined for member in group}
        whole = [member for member in groups if member in members]
        groups |= dict.fromkeys(whole, whole)
    return [group for node, group in groups.items() if len(group) > 1 and group[0] is node]


def rounded_input(layer: fx.Node, entering: Collection[fx.Node]) -> fx.Node | None:
    """Return which of the nodes of `layer_input_bits` a layer reads; None if it reads none.

    Args:
        layer: A layer.
        entering: Nodes whose outputs, also moved, enter layers with bits of their own.
    """
    x = queries.input_of(layer)
    return next((node for node in (x, queries.grid_source(x)) if node in entering), None)


def layer_input_bits(teacher: Captured, scheme: Scheme) -> dict[fx.Node, int]:
    """Return the nodes whose outputs enter layers with fewer bits than they are carried with.

    In `full` placement a tensor that enters layers as well as sums is carried in 8 bits, so that
    the errors of rounding do not add up along a residual path, and multiplied in those of the
    scheme. A concatenation that has the grid of its inputs is carried alike.

    Returns:
        Bits of the copies that enter layers, by the nodes that they are copies of.
    """
    if scheme.placement == "relu":
        return {}
    if scheme.placement == "tokens":
        return _token_bits(teacher, scheme)
    nodes = list(teacher.network.graph.nodes)
    signals = _signals(nodes)
    activations = activation_bits(teacher, scheme)
    joined: set[fx.Node] = set()
    if scheme.grids.one_grid_for_joins:
        joined = joined.union(*joined_groups(nodes, activations))
    overridden = scheme.overridden(list(filter(queries.has_weight, nodes)))
    found = {}
    for node, carried in activations.items():
        readers = [reader for reader in _entered(node) if reader is not None]
        is_carried = _is_carried(node) or node in joined
        if node in signals or not is_carried or not readers:
            continue
        others = [overridden[r].bits for r in readers if r in overridden]
        own = [_CARRIED_BITS if bits is None else bits for bits in others]
        needed = max([scheme.bits.activations, *(own if len(own) == len(readers) else [])])
        if needed < carried:
            found[node] = needed
    return found


def _token_bits(teacher: Captured, scheme: Scheme) -> dict[fx.Node, int]:
    """Return what enters the layers of a language model whose weights are quantized.

    Layers with other bits get these, too; what several layers read has the most of theirs.
    """
    if scheme.bits.activations == UNROUNDED:
        return {}
    layers = list(filter(queries.has_weight, teacher.network.graph.nodes))
    overridden = scheme.overridden(layers)
    found: dict[fx.Node, int] = {}
    for layer in scheme.weight_bits(layers):
        own = overridden[layer].bits if layer in overridden else scheme.bits.activations
        x = queries.input_of(layer)
        found[x] = max(found.get(x, 0), own or 0)
    return found


def _full_placement(
    nodes: list[fx.Node], scheme: Scheme, floats: set[fx.Node]
) -> dict[fx.Node, int]:
    tail = shapes_outputs(nodes)
    quantized = {
        queries.grid_source(source)
        for node in nodes
        if operators.name_of(node) in operators.INTEGER_CONSUMERS
        and not stays_float(node)
        and not queries.pools_powers(node)
        and not feeds_root_only(node)
        and node not in tail
        for source in node.all_input_nodes
        if queries.is_activation(source)
    }
    weighted = [node for node in nodes if operators.name_of(node) in operators.WEIGHTED]
    returned: set[fx.Node] = set()
    for node in weighted:
        is_rounded = node not in floats and not tail.issuperset(node.users)
        if is_rounded and not gives_scores(_after_batch_norm(node)):
            returned |= _rounded(_after_batch_norm(node), quantized | tail)
    quantized |= returned
    signals = _signals(nodes) | returned
    return {
        node: _CARRIED_BITS if node in signals or _is_carried(node) else scheme.bits.activations
        for node in nodes
        if node in quantized
    }


def _signals(nodes: list[fx.Node]) -> set[fx.Node]:
    """Return the nodes that have 8 bits wherever they enter: inputs, and outputs without a ReLU."""
    return _input_signals(nodes) | {
        _after_batch_norm(node) for node in nodes if operators.name_of(node) in operators.WEIGHTED
    }


def _is_carried(node: fx.Node) -> bool:
    """Return whether a node's output, also moved, enters a sum or a concatenation."""
    return any(
        _is_carried(user)
        if queries.keeps_grid(user)
        else operators.name_of(user) in operators.SUMS | operators.JOINS
        for user in node.users
    )


def shapes_outputs(nodes: list[fx.Node]) -> set[fx.Node]:
    """Return the nodes after the last layers, which stay float, up to the outputs.

    Examples are a sigmoid of scores and the arithmetic of boxes.
    """
    computes = operators.WEIGHTED | operators.POOLING | operators.MAX_POOLING | operators.PRODUCTS
    tail: set[fx.Node] = set()
    for node in reversed(nodes):
        is_last = node.op == "output"
        shapes = node.op == "call_function" and (
            operators.name_of(node) not in computes or _is_sum_of_vector(node)
        )
        if is_last or (shapes and node.users and tail.issuperset(node.users)):
            tail.add(node)
    return tail


def _is_sum_of_vector(node: fx.Node) -> bool:
    """Return whether a node sums vectors [N, C], as a normalisation does; no kernel pools there."""
    is_sum = operators.name_of(node) == operators.SUM
    return is_sum and bool(node.all_input_nodes[0].meta["val"].ndim == 2)


def _entered(node: fx.Node) -> list[fx.Node | None]:
    """Return the layers that read the node's output, also reshaped; None for any other reader."""
    found: list[fx.Node | None] = []
    for user in node.users:
        if queries.keeps_grid(user):
            found += _entered(user)
        elif operators.name_of(user) != operators.BATCH_SIZE:
            is_layer = queries.has_weight(user) and queries.weight_of(user) is not node
            found.append(user if is_layer else None)
    return found


def _after_batch_norm(node: fx.Node) -> fx.Node:
    """Return the batch norm that will be folded into the node, or the node itself."""
    return batch_norm_after(node) or node


def _rounded(node: fx.Node, settled: set[fx.Node]) -> set[fx.Node]:
    """Return what must be quantized for a layer's output to be rounded, at most one node.

    That is the output itself, or the last clamp around 0 that it passes with no other reader on the
    way. Integer kernels clip where they round, so a grid in front of a clamp would round twice. A
    clamp that a root reads stays float.

    Args:
        node: The layer's output.
        settled: Nodes that are quantized, or stay float.
    """
    last = node
    while last not in settled and len(last.users) == 1:
        (reader,) = last.users
        if not queries.clamps_around_zero(reader):
            break
        last = reader
    if last in settled or not last.users:
        return set()
    is_read_by_root = last is not node and any(map(queries.is_root, last.users))
    return set() if is_read_by_root else {last}


def feeds_root_only(node: fx.Node) -> bool:
    """Return whether only roots read a product or sum, also moved: x^p with 0 < p < 1.

    A root has no derivative at 0, which a grid rounds small numbers to.
    """
    if operators.name_of(node) not in operators.AFFINE and not queries.keeps_grid(node):
        return False
    return bool(node.users) and all(
        queries.is_root(user) or feeds_root_only(user) for user in node.users
    )


def _input_signals(nodes: list[fx.Node]) -> set[fx.Node]:
    """Return the network's inputs, and nodes that scale or shift them by constants."""
    signals = {node for node in nodes if node.op == "placeholder"}
    for node in nodes:
        sources = [
            queries.grid_source(source)
            for source in node.all_input_nodes
            if queries.is_activation(source)
        ]
        if operators.name_of(node) in operators.AFFINE and len(sources) == 1:
            signals |= {node} if sources[0] in signals else set()
    return signals
