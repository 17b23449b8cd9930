"""The canonical graph: one form for operations that an exported graph writes in several ways."""

from typing import Any

from torch import Tensor, fx, nn

from gdfq.graph import operators, queries
from gdfq.graph.constants import constants_of
from gdfq.graph.fakes import call
from gdfq.graph.frozen_norms import recognise_batch_norms_
from gdfq.graph.paddings import merge_paddings_
from gdfq.graph.tensors import attribute, flat_module, tensors_of
from gdfq.graph.writes import write_functionally_


def canonicalize(module: fx.GraphModule) -> fx.GraphModule:
    """Return the canonical graph of an exported program.

    Batch norms, reshapes, paddings and products with weight matrices have one form each. What
    depends only on tensors of the network is a constant. Operators are named in order.
    """
    _simplify(module)
    write_functionally_(module)
    merge_paddings_(module.graph)
    recognise_batch_norms_(module)
    _parts_to_softmax(module.graph)
    _fold_constants(module)  # a weight may be written transposed
    _products_to_linear(module.graph)
    _fold_constants(module)
    _number_powers(module)
    _number_clamps(module)
    _clamps_before_moves(module.graph)
    _create_on_device_of_input(module.graph)
    module.graph.eliminate_dead_code()
    return flat_module(_renamed(module.graph), tensors_of(module))


def _simplify(module: fx.GraphModule) -> None:
    """Write batch norms and views in one form, and remove operators that do nothing."""
    graph = module.graph
    (output,) = graph.find_nodes(op="output")
    returned = output.args[0]
    assert isinstance(returned, tuple | list)
    tensors = tuple(node for node in returned if node is not None)
    output.args = (tensors[0] if len(tensors) == 1 else tensors,)
    # Export flattens inputs through pytree; a plain graph needs no such code.
    graph.set_codegen(fx.graph.CodeGen())
    batch_norm, reshape, full = map(
        operators.resolve, (operators.BATCH_NORM, operators.RESHAPE, operators.FULL)
    )
    for node in list(graph.nodes):
        name = operators.name_of(node)
        if name == operators.INFERENCE_BATCH_NORM:
            x, weight, bias, mean, variance, momentum, eps = node.args
            (first,) = (user for user in node.users if user.args[1] == 0)
            with graph.inserting_before(node):
                args = (x, weight, bias, mean, variance, False, momentum, eps, False)
                replacement = graph.call_function(batch_norm, args)
            replacement.meta = dict(first.meta)
            first.replace_all_uses_with(replacement)
        elif name in operators.BATCH_STATISTICS_NORMS:
            (first,) = (user for user in node.users if user.args[1] == 0)
            first.replace_all_uses_with(_normalised_over_batch(node))
        elif name in operators.VIEWS:
            node.target = reshape  # a view fails on channels_last tensors
        elif name == operators.NORM and len(node.args) > 2 and _is_of_vector(node.args[2]):
            order = 2 if node.args[1] is None else node.args[1]
            node.target = operators.resolve(operators.VECTOR_NORM)
            node.args = (node.args[0], order, *node.args[2:])
        elif name in operators.SPELLINGS:
            node.target = operators.resolve(operators.SPELLINGS[name])
        elif name in operators.IDENTITIES:
            node.replace_all_uses_with(node.args[0])
        elif name in operators.FILLS and all(type(side) is int for side in node.meta["val"].shape):
            # Only the device of the image matters, and the mask that is made from it can be folded.
            value = node.meta["val"]
            fill = operators.FILLS[name] if operators.FILLS[name] is not None else node.args[-1]
            with graph.inserting_before(node):
                replacement = graph.call_function(
                    full, (list(value.shape), fill), {"dtype": value.dtype}
                )
            replacement.meta = dict(node.meta)
            node.replace_all_uses_with(replacement)
        elif name in operators.TYPED_LIKE:
            x, like = node.args[:2]
            assert isinstance(like, fx.Node)
            dtype = like.meta["val"].dtype
            if x.meta["val"].dtype == dtype:
                node.replace_all_uses_with(x)
            else:
                node.replace_all_uses_with(call(node, operators.CAST, x, kwargs={"dtype": dtype}))
        elif name in operators.SQUEEZES and _squeezes_batch(node):
            x = queries.input_of(node)
            ones = [dim for dim in _squeezed(node) if _is_one(x.meta["val"].shape[dim])]
            node.replace_all_uses_with(call(node, operators.SQUEEZE_DIMS, x, ones) if ones else x)
        elif name == operators.WRITE:  # the update of a buffer, at the end of the graph
            node.replace_all_uses_with(node.args[1])
            graph.erase_node(node)
        elif node.op == "call_function" and "assert" in name:
            graph.erase_node(node)
    graph.eliminate_dead_code()


def _squeezed(node: fx.Node) -> list[int]:
    """Return the dimensions that are removed where they have one entry."""
    ndim = queries.input_of(node).meta["val"].ndim
    dims: Any = node.args[1] if len(node.args) > 1 else list(range(ndim))
    return [dim % ndim for dim in ([dims] if isinstance(dims, int) else dims)]


def _is_one(side: object) -> bool:
    return type(side) is int and side == 1


def _squeezes_batch(node: fx.Node) -> bool:
    """Return whether a batch of one image would lose its dimension."""
    shape = queries.input_of(node).meta["val"].shape
    return any(type(shape[dim]) is not int for dim in _squeezed(node))


def _normalised_over_batch(node: fx.Node) -> fx.Node:
    """Write a batch norm of the batch's own statistics as a group norm with a channel per group.

    Images and positions are one dimension: [N, C, *size] -> [1, C, N size] -> [N, C, *size].
    """
    x, weight, bias = node.args[:3]
    eps = node.args[-1]
    assert isinstance(x, fx.Node)
    channels, *size = x.meta["val"].shape[1:]
    swapped = call(node, operators.SWAP, x, 0, 1)
    joined = call(node, operators.RESHAPE, swapped, [1, channels, -1])
    normalised = call(node, operators.GROUP_NORM, joined, channels, weight, bias, eps)
    apart = call(node, operators.RESHAPE, normalised, [channels, -1, *size])
    return call(node, operators.SWAP, apart, 0, 1)


def _number_powers(module: fx.GraphModule) -> None:
    """Write x ** p with one constant number p, perhaps a parameter, as a power with that number."""
    power = operators.resolve(operators.POWER)
    for node in list(module.graph.nodes):
        if operators.name_of(node) != operators.POWER_OF_TENSOR:
            continue
        x, exponent = node.args
        assert isinstance(exponent, fx.Node)
        if exponent.op != "get_attr" or exponent.meta["val"].numel() != 1:
            continue
        number = attribute(module, str(exponent.target)).item()
        if isinstance(x, fx.Node) and x.meta["val"].shape == node.meta["val"].shape:
            node.target, node.args = power, (x, number)


def _number_clamps(module: fx.GraphModule) -> None:
    """Write a minimum or maximum with one constant number, or two of them, as a clamp.

    The bounds of floats are floats: ONNX has no clamp between an integer and a float.
    """
    clamp = operators.resolve(operators.CLAMP)

    def number(bound: Any) -> Any:
        """The number that a bound is; the node itself if it is computed or of many numbers."""
        if not isinstance(bound, fx.Node) or bound.op != "get_attr":
            return bound
        is_one = bound.meta["val"].numel() == 1
        return attribute(module, str(bound.target)).item() if is_one else bound

    for node in list(module.graph.nodes):
        name = operators.name_of(node)
        if name not in operators.CLAMPS | operators.CLAMPS_BY_TENSORS:
            continue
        x, *bounds = (number(argument) for argument in node.args)
        if not isinstance(x, fx.Node) and name in operators.EXTREMES:  # the number comes first
            x, bounds = bounds[0], [x]
        named = {key: number(bound) for key, bound in node.kwargs.items()}
        if not isinstance(x, fx.Node) or any(
            isinstance(bound, fx.Node) for bound in (*bounds, *named.values())
        ):
            continue
        value, own = x.meta["val"], node.meta["val"]
        if (value.shape, value.dtype) != (own.shape, own.dtype):
            continue  # the bound broadcasts or promotes
        if own.is_floating_point():
            bounds = [None if bound is None else float(bound) for bound in bounds]
            named = {key: None if b is None else float(b) for key, b in named.items()}
        if name in operators.EXTREMES:
            low, high = (bounds[0], None) if name == operators.MAXIMUM else (None, bounds[0])
            bounds = [low, high]
        if name in operators.CLAMPS_BY_TENSORS:
            node.target = clamp
        node.args, node.kwargs = (x, *bounds), named
    module.graph.eliminate_dead_code()


def _clamps_before_moves(graph: fx.Graph) -> None:
    """Write the clamp around 0 of moved values as moved values of a clamp, which are the same.

    A runtime clips and rounds what a layer returns if nothing stands in between.
    """
    for clamp in list(graph.nodes):
        while queries.clamps_around_zero(clamp) and _only_moves_for(clamp):
            move = queries.input_of(clamp)
            source = queries.input_of(move)
            first = call(
                move, operators.name_of(clamp), source, *clamp.args[1:], kwargs=clamp.kwargs
            )
            second = call(clamp, operators.name_of(move), first, *move.args[1:], kwargs=move.kwargs)
            clamp.replace_all_uses_with(second)
            graph.erase_node(clamp)
            graph.erase_node(move)
            clamp = first


def _only_moves_for(clamp: fx.Node) -> bool:
    """Return whether the node before a clamp moves one activation for it alone."""
    move = queries.input_of(clamp)
    if not queries.keeps_grid(move) or queries.has_several_outputs(move) or len(move.users) > 1:
        return False
    return isinstance(move.args[0], fx.Node) and queries.is_activation(move.args[0])


def _create_on_device_of_input(graph: fx.Graph) -> None:
    """Make tensors whose size depends on the batch on the device of the input."""
    (first, *_) = graph.find_nodes(op="placeholder")
    for node in list(graph.nodes):
        name = operators.name_of(node)
        kwargs = {"dtype": node.meta["val"].dtype} if name in operators.CREATIONS else {}
        if name in operators.LIKE_INPUT:
            made = call(node, operators.LIKE_INPUT[name], first, *node.args, kwargs=kwargs)
        elif name in {operators.ARANGE, operators.ARANGE_FROM}:
            start, end = node.args if name == operators.ARANGE_FROM else (0, *node.args)
            count = call(node, operators.SUBTRACT, end, start) if start else end
            ones = call(node, operators.NEW_ONES, first, [count], kwargs=kwargs)
            made = call(node, operators.CUMSUM, ones, 0)
            made = call(node, operators.ADD_NUMBER, made, start - 1)
        else:
            continue
        node.replace_all_uses_with(made)
    graph.eliminate_dead_code()


def _is_of_vector(dims: Any) -> bool:
    return isinstance(dims, int) or (isinstance(dims, list | tuple) and len(dims) == 1)


def _parts_to_softmax(graph: fx.Graph) -> None:
    """Write exp(x) / Σ exp(x) as a softmax, also with the largest x subtracted first."""
    for node in list(graph.nodes):
        if operators.name_of(node) != operators.DIVIDE or len(node.all_input_nodes) != 2:
            continue
        numerator, total = node.args
        if operators.name_of(total) != operators.SUM or total.args[2:3] != (True,):
            continue
        exponentials = numerator, total.args[0]
        if any(operators.name_of(n) != operators.EXPONENTIAL for n in exponentials):
            continue
        (x, other), dims = (n.args[0] for n in exponentials), total.args[1]
        if x is not other or len(dims) != 1:
            continue
        node.replace_all_uses_with(call(node, operators.SOFTMAX_OPERATOR, x, dims[0]))
    graph.eliminate_dead_code()


def _products_to_linear(graph: fx.Graph) -> None:
    """Write the product with a weight matrix, x @ W (+ b), as a linear layer."""
    transpose, linear = map(operators.resolve, (operators.TRANSPOSE, operators.LINEAR))
    for node in list(graph.nodes):
        name = operators.name_of(node)
        arguments: tuple[Any, ...]
        if name in operators.MATRIX_PRODUCTS:
            arguments = (None, *node.args)
        elif name == operators.ADDMM:
            arguments = (*node.args, *node.kwargs.values())
        else:
            continue
        bias, x, weight, *scales = arguments
        if scales or not isinstance(weight, fx.Node) or weight.op != "get_attr":
            continue
        if weight.meta["val"].ndim != 2:
            continue
        with graph.inserting_before(node):
            transposed = graph.call_function(transpose, (weight,))  # folded afterwards
            layer = graph.call_function(linear, (x, transposed, bias))
        layer.meta = dict(node.meta)
        node.replace_all_uses_with(layer)
    graph.eliminate_dead_code()


def _fold_constants(module: fx.GraphModule) -> None:
    """Replace what depends only on tensors of the network, for instance weight standardisation.

    A constant that is made from parameters is a parameter; it lies in the module of the largest.
    """
    graph = module.graph
    known = constants_of(module)
    for node in [n for n in known if n.op != "get_attr" and not all(u in known for u in n.users)]:
        value = known[node].value
        if not isinstance(value, Tensor):
            continue  # numbers, and tuples of tensors: what is taken out of those folds
        tensors = {source: known[source].value for source in known[node].sources}
        sources = [source for source, tensor in tensors.items() if isinstance(tensor, nn.Parameter)]
        sources = sources if value.is_floating_point() else []
        largest = max(sources, key=lambda source: tensors[source].numel(), default=None)
        kept = nn.Buffer(value) if largest is None else nn.Parameter(value)
        with graph.inserting_before(node):
            constant = graph.get_attr(_attach(module, largest, kept, default=node.name))
        constant.meta = dict(node.meta)
        node.replace_all_uses_with(constant)
    graph.eliminate_dead_code()


def _attach(module: nn.Module, beside: fx.Node | None, value: Tensor, default: str) -> str:
    """Add a tensor to the module that holds another one, and return its full path."""
    path, _, leaf = ("" if beside is None else str(beside.target)).rpartition(".")
    holder, name = module.get_submodule(path), f"folded_{leaf or default}"
    while hasattr(holder, name):
        name += "_"  # of one layer still
    setattr(holder, name, value)
    return f"{path}.{name}" if path else name


def _renamed(graph: fx.Graph) -> fx.Graph:
    """Return the same graph with its operators named in order: conv2d, conv2d_1 and so on."""
    new_graph = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), new.__getitem__)
        name = operators.short_name(node) or node.name
        new[node] = new_graph.create_node(node.op, node.target, args, kwargs, name)
        new[node].meta = dict(node.meta)
    return new_graph
