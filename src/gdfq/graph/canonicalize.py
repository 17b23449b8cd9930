"""The canonical graph: one form for operations that an exported graph writes in several ways."""

import math
from typing import Any

import torch
from torch import Tensor, fx, nn

from gdfq.graph import operators, queries
from gdfq.graph.fakes import call
from gdfq.graph.tensors import attribute, flat_module, tensors_of
from gdfq.graph.writes import write_functionally_


def canonicalize(module: fx.GraphModule) -> fx.GraphModule:
    """Return the canonical graph of an exported program.

    Batch norms, reshapes and products with weight matrices have one form each. What depends only on
    tensors of the network is a constant. Operators are named in order.
    """
    _simplify(module)
    write_functionally_(module)
    _fold_constants(module)  # a weight may be written transposed
    _products_to_linear(module.graph)
    _fold_constants(module)
    module.graph.eliminate_dead_code()
    return flat_module(_renamed(module.graph), tensors_of(module))


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    _dropout: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(Q Kᵀ s + mask) V (arXiv 1706.03762): two products with quantizable inputs.

    Q [*, T, d], K [*, S, d], V [*, S, e] -> [*, T, e]; s is d^−½ unless given. The signature is
    that of `torch.nn.functional.scaled_dot_product_attention`.
    """
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = (torch.stack([tensor] * groups, -3).flatten(-4, -3) for tensor in (key, value))
    scores = query @ key.transpose(-2, -1)
    scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~visible, -math.inf)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -math.inf)
    elif mask is not None:
        scores = scores + mask
    return scores.softmax(-1) @ value


DECOMPOSED = {operators.aten_function(operators.ATTENTION): _attention}
"""Operators that export decomposes; all others are only made functional."""


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
        elif name in operators.VIEWS:
            node.target = reshape  # a view fails on channels_last tensors
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
        elif name == operators.SQUEEZE:  # also for a batch of one, the batch is a dimension
            x = queries.input_of(node)
            ones = [
                i for i, side in enumerate(x.meta["val"].shape) if type(side) is int and side == 1
            ]
            node.replace_all_uses_with(call(node, operators.SQUEEZE_DIMS, x, ones) if ones else x)
        elif name == operators.WRITE:  # the update of a buffer, at the end of the graph
            node.replace_all_uses_with(node.args[1])
            graph.erase_node(node)
        elif node.op == "call_function" and "assert" in name:
            graph.erase_node(node)
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
    known: dict[fx.Node, Any] = {
        node: attribute(module, str(node.target)) for node in graph.find_nodes(op="get_attr")
    }
    parameters: dict[fx.Node, list[fx.Node]] = {
        node: [node] for node, value in known.items() if isinstance(value, nn.Parameter)
    }
    for node in graph.nodes:
        inputs = node.all_input_nodes
        function: Any = node.target
        is_random = torch.Tag.nondeterministic_seeded in getattr(function, "tags", ())
        if node.op != "call_function" or is_random or not all(n in known for n in inputs):
            continue
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
        with torch.no_grad():
            known[node] = function(*args, **kwargs)
        parameters[node] = [source for n in inputs for source in parameters.get(n, ())]
    for node in [n for n in known if n.op != "get_attr" and not all(u in known for u in n.users)]:
        value = known[node]
        if not isinstance(value, Tensor):
            continue  # numbers, and tuples of tensors: what is taken out of those folds
        sources = parameters[node] if value.is_floating_point() else []
        largest = max(sources, key=lambda source: known[source].numel(), default=None)
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
