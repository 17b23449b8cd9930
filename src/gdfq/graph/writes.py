"""Writes into parts of a tensor, in exported graphs, as operators that make a new tensor.

`torch.export` writes y[:, 2:5] = x as a chain of slices, copies and scatters. Here it becomes the
concatenation of what is kept and what is written, which quantizers and runtimes know.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from gdfq.graph import operators
from gdfq.graph.fakes import call, value_of
from gdfq.graph.tensors import attribute


def write_functionally_(module: fx.GraphModule) -> None:
    """Replace the writes into parts of tensors in an exported graph."""
    for node in list(module.graph.nodes):
        rule = _RULES.get(operators.name_of(node))
        made = None if rule is None else rule(module, node)
        if made is not None:
            node.replace_all_uses_with(made)
    module.graph.eliminate_dead_code()


Rule = Callable[[fx.GraphModule, fx.Node], fx.Node | None]
"""Returns the node to use instead of one, or None to keep it."""


def _empty(_module: nn.Module, node: fx.Node) -> fx.Node:
    """Write an uninitialised tensor as zeros: what a network reads of it, it has written before."""
    kwargs = {"dtype": value_of(node).dtype}
    if operators.name_of(node) == operators.EMPTY_LIKE:
        return call(node, operators.FULL_LIKE, node.args[0], 0, kwargs=kwargs)
    sizes = node.args[0 if operators.name_of(node) == operators.EMPTY else 1]
    return call(node, operators.FULL, sizes, 0, kwargs=kwargs)


def _fill(module: nn.Module, node: fx.Node) -> fx.Node:
    """fill(x, value): a tensor of the shape of x."""
    x, value = node.args
    assert isinstance(x, fx.Node)
    return _written(module, node, x, value)


def _zero(module: nn.Module, node: fx.Node) -> fx.Node:
    """zero(x): zeros of the shape of x."""
    return _written(module, node, node.all_input_nodes[0], 0)


def _masked_fill(module: nn.Module, node: fx.Node) -> fx.Node:
    """masked_fill(x, mask, y) with a tensor y of one number."""
    x, mask, value = node.args
    number = _number(module, value)
    if number is None:
        return call(node, operators.WHERE, mask, value, x)
    return call(node, operators.MASKED_FILL, x, mask, number)


def _copy(module: nn.Module, node: fx.Node) -> fx.Node:
    """copy(x, y): y in the shape and type of x."""
    x, y = node.args[:2]
    assert isinstance(x, fx.Node)
    return _written(module, node, x, y)


def _slice(_module: nn.Module, node: fx.Node) -> fx.Node | None:
    """A slice of everything is the tensor; one of a concatenation is some of its parts."""
    x, dim, start, end, step = _range(node)
    size = value_of(x).shape[dim]
    if step != 1:
        return None
    if start == 0 and _is_end(end, size):
        return x
    if not isinstance(size, int):
        return None
    start, end, _ = slice(start, end).indices(size)
    if operators.name_of(x) == operators.FULL and end > start:
        sizes: Any = list(x.args[0])  # type: ignore[arg-type]
        sizes[dim] = end - start
        return call(node, operators.FULL, sizes, x.args[1], kwargs=x.kwargs)
    if operators.name_of(x) != operators.CONCATENATE or _dim_of(x, 1, value_of(x).ndim) != dim:
        return None
    parts: Any = x.args[0]
    at, inside = 0, []
    for part in parts:
        length = value_of(part).shape[dim]
        if start <= at and at + length <= end:
            inside.append(part)
        elif at < end and start < at + length:  # a part that is cut
            return None
        at += length
    if not inside:
        return None
    return inside[0] if len(inside) == 1 else call(node, operators.CONCATENATE, inside, dim)


def _slice_scatter(_module: nn.Module, node: fx.Node) -> fx.Node | None:
    """slice_scatter(x, y, dim, start, end): y between what is before and behind it in x."""
    y, *arguments = node.args[1:]
    x, dim, start, end, step = _range(node, arguments)
    size = value_of(x).shape[dim]
    assert isinstance(y, fx.Node)
    if step != 1:
        return None
    if start == 0 and _is_end(end, size):
        return y
    return _between(node, x, y, dim, start, end) if isinstance(size, int) else None


def _select_scatter(_module: nn.Module, node: fx.Node) -> fx.Node | None:
    """select_scatter(x, y, dim, index): y, with one more dimension, in place of a slice of x."""
    x, y, _, index = node.args
    assert isinstance(x, fx.Node)
    assert isinstance(index, int)
    dim = _dim_of(node, 2, value_of(x).ndim)
    size = value_of(x).shape[dim]
    if not isinstance(size, int):
        return None
    start = index % size
    return _between(node, x, call(node, operators.UNSQUEEZE, y, dim), dim, start, start + 1)


def _index_put(module: nn.Module, node: fx.Node) -> fx.Node | None:
    """Write to constant places of one dimension as a choice of old and new slices.

    Writing one number where a mask says so is filling under a mask.
    """
    x, indices, value, *accumulate = node.args
    assert isinstance(x, fx.Node)
    assert isinstance(indices, tuple | list)
    given = [(dim, index) for dim, index in enumerate(indices) if index is not None]
    if any(accumulate) or node.kwargs or len(given) != 1:
        return None
    ((dim, index),) = given
    assert isinstance(index, fx.Node)
    number = _number(module, value)
    if value_of(index).dtype == torch.bool and value_of(index).shape == value_of(x).shape:
        masked = operators.MASKED_FILL
        return None if number is None else call(node, masked, x, index, number)
    places = _constant(module, index)
    size = value_of(x).shape[dim]
    if places is None or places.ndim != 1 or not isinstance(size, int):
        return None
    if places.dtype == torch.bool:
        places = places.nonzero().flatten()
    places = places % size
    chosen = torch.arange(size)
    chosen[places] = size + torch.arange(len(places))
    new = _selected(module, node, x, dim, places)
    joined = call(node, operators.CONCATENATE, [x, _written(module, node, new, value)], dim)
    return _selected(module, node, joined, dim, chosen)


_RULES: Mapping[str, Rule] = {
    operators.EMPTY: _empty,
    operators.EMPTY_LIKE: _empty,
    operators.NEW_EMPTY: _empty,
    **dict.fromkeys(operators.FILL, _fill),
    operators.ZERO: _zero,
    operators.COPY: _copy,
    operators.MASKED_FILL_TENSOR: _masked_fill,
    operators.SLICE: _slice,
    operators.SLICE_SCATTER: _slice_scatter,
    operators.SELECT_SCATTER: _select_scatter,
    operators.INDEX_PUT: _index_put,
}


def _range(node: fx.Node, arguments: Any = None) -> tuple[fx.Node, int, Any, Any, Any]:
    """Return the tensor, dimension, start, end and step of a slice."""
    x, *rest = node.args
    assert isinstance(x, fx.Node)
    given: list[Any] = list(rest if arguments is None else arguments)
    absent: list[Any] = [0, None, None, 1]
    dim, start, end, step = given + absent[len(given) :]
    return x, int(dim) % value_of(x).ndim, start or 0, end, step


def _is_end(end: Any, size: Any) -> bool:
    """Return whether an end of a slice is that of the dimension, whatever its size."""
    if end is None:
        return True
    return isinstance(end, int) and end >= (
        size if isinstance(size, int) else torch.iinfo(torch.int64).max
    )


def _dim_of(node: fx.Node, place: int, ndim: int) -> int:
    dim = node.args[place] if len(node.args) > place else node.kwargs.get("dim", 0)
    assert isinstance(dim, int)
    return dim % ndim


def _between(at: fx.Node, x: fx.Node, y: fx.Node, dim: int, start: Any, end: Any) -> fx.Node:
    """Return y between the slices of x before `start` and from `end` on."""
    size = value_of(x).shape[dim]
    start, end, _ = slice(start, end).indices(size)
    parts = [y]
    if start > 0:
        parts.insert(0, _sliced(at, x, dim, 0, start))
    if end < size:
        parts.append(_sliced(at, x, dim, end, size))
    return y if len(parts) == 1 else call(at, operators.CONCATENATE, parts, dim)


def _sliced(at: fx.Node, x: fx.Node, dim: int, start: int, end: int) -> fx.Node:
    node = call(at, operators.SLICE, x, dim, start, end)
    made = _slice(nn.Module(), node)
    return node if made is None else made


def _selected(module: nn.Module, at: fx.Node, x: fx.Node, dim: int, places: Tensor) -> fx.Node:
    name = f"places_of_{at.name}"
    while hasattr(module, name):
        name += "_"
    module.register_buffer(name, places)
    with at.graph.inserting_before(at):
        index = at.graph.get_attr(name)
    index.meta["val"] = value_of(x).new_empty(len(places), dtype=torch.int64)
    return call(at, operators.INDEX_SELECT, x, dim, index)


def _written(module: nn.Module, at: fx.Node, x: fx.Node, value: Any) -> fx.Node:
    """Return a value, a number or a node, in the shape and type of x."""
    number = _number(module, value)
    shape, dtype = value_of(x).shape, value_of(x).dtype
    if number is not None:
        return call(at, operators.FULL_LIKE, x, number, kwargs={"dtype": dtype})
    if value_of(value).dtype != dtype:
        value = call(at, operators.CAST, value, kwargs={"dtype": dtype})
    if value_of(value).shape == shape:
        return value  # type: ignore[no-any-return]
    if value_of(value).ndim == len(shape):
        sizes = [
            -1 if old == new else new for old, new in zip(value_of(value).shape, shape, strict=True)
        ]
        if all(isinstance(size, int) for size in sizes):
            return call(at, operators.EXPAND, value, sizes)
    return call(at, operators.ADD, call(at, operators.ZEROS_LIKE, x), value)


def _number(module: nn.Module, value: Any) -> float | int | bool | None:
    """Return the number that a value is, or None."""
    if not isinstance(value, fx.Node):
        return value  # type: ignore[no-any-return]
    constant = _constant(module, value)
    return None if constant is None or constant.numel() != 1 else constant.item()


def _constant(module: nn.Module, node: fx.Node) -> Tensor | None:
    """Return the constant tensor that a node is, perhaps copied, or None."""
    while operators.name_of(node) in operators.COPIES:
        (node,) = node.all_input_nodes
    if node.op != "get_attr":
        return None
    tensor = attribute(module, str(node.target))
    return None if isinstance(tensor, nn.Parameter) else tensor
