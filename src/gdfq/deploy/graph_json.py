"""Graphs as JSON: nodes by name, operators from an allow-list, and no code."""

import math
import re
from collections.abc import Mapping
from keyword import iskeyword
from typing import Any

import torch
from torch import Tensor, fx

from gdfq.errors import UsageError, first_line
from gdfq.graph import operators
from gdfq.graph.tensors import flat_module

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PATH = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
# Names end up in the code that torch.fx writes for a graph, so nothing else may pass.

_TORCH_VALUES: dict[str, Any] = {
    str(value): value
    for value in (
        *(torch.float32, torch.float64, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
        *(torch.contiguous_format, torch.preserve_format, torch.channels_last),
        torch.strided,
    )
}


def graph_to_json(graph: fx.Graph) -> list[dict[str, Any]]:
    """Return the graph's nodes in order; they refer to tensors by name."""
    return [_node_to_json(node) for node in graph.nodes]


def graph_from_json(nodes: object, tensors: Mapping[str, Tensor]) -> fx.GraphModule:
    """Build a graph from its nodes and the given tensors.

    Raises:
        UsageError: There is an operator outside `operators.ALLOWED`, a missing tensor, a node that
            is used before its definition, or anything else that `graph_to_json` does not write.
    """
    graph = fx.Graph()
    known: dict[str, fx.Node] = {}
    if not isinstance(nodes, list):
        raise _broken("its nodes are not a list")
    for entry in nodes:
        try:
            name, kind, target = entry["name"], entry["kind"], entry["target"]
            args = tuple(_from_json(value, known) for value in entry["args"])
            kwargs = {key: _from_json(value, known) for key, value in entry["kwargs"].items()}
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            raise _broken(f"a node is not readable ({error!r})") from error
        if not (isinstance(name, str) and isinstance(target, str)):
            raise _broken("a node's name or target is not text")
        if not _NAME.fullmatch(name) or iskeyword(name) or name in known:
            raise _broken(f"{name!r} is not a new node name")
        if not all(_NAME.fullmatch(key) and not iskeyword(key) for key in kwargs):
            raise _broken(f"node {name!r} has an argument with an impossible name")
        if kind == "operator":
            known[name] = graph.create_node("call_function", _resolve(target), args, kwargs, name)
        elif kind == "tensor":
            if target not in tensors or not _PATH.fullmatch(target):
                raise _broken(f"it refers to a tensor {target!r} that is not in the file")
            known[name] = graph.create_node("get_attr", target, name=name)
        elif kind == "input":
            known[name] = graph.create_node("placeholder", name, name=name)
        elif kind == "output" and len(args) == 1:
            known[name] = graph.output(args[0])
        else:
            raise _broken(f"node {name!r} is of an unknown kind {kind!r}")
    kinds = [node.op for node in graph.nodes]
    if not kinds.count("placeholder") or kinds.count("output") != 1 or kinds[-1] != "output":
        raise _broken("it must have inputs and end with its one output")
    try:
        return flat_module(graph, dict(tensors))
    except Exception as error:  # of Python, which compiles it, and of torch, which sets attributes
        raise _broken(f"it cannot be compiled ({first_line(error)})") from error


_KINDS = {
    "call_function": "operator",
    "get_attr": "tensor",
    "placeholder": "input",
    "output": "output",
}


def _node_to_json(node: fx.Node) -> dict[str, Any]:
    return {
        "name": node.name,
        "kind": _KINDS[node.op],
        "target": operators.name_of(node) or str(node.target),
        "args": [_to_json(value) for value in node.args],
        "kwargs": {key: _to_json(value) for key, value in node.kwargs.items()},
    }


def _to_json(value: object) -> Any:
    """Return numbers, strings, None and lists as they are, others as an object with one key."""
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_to_json(item) for item in value]
    if isinstance(value, slice):
        return {"slice": [_to_json(v) for v in (value.start, value.stop, value.step)]}
    if str(value) in _TORCH_VALUES:
        return {"torch": str(value)}
    raise UsageError(
        "a stored graph can hold numbers, strings and torch types; an operator of this network "
        f"takes {value!r}. Report the network so that it can be added."
    )


def _from_json(value: object, known: Mapping[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_from_json(item, known) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "node":
        return known[content]
    if kind == "float":
        return float(content)
    if kind == "slice":
        return slice(*(_from_json(item, known) for item in content))
    if kind == "torch":
        return _TORCH_VALUES[content]
    raise ValueError(kind)


def _resolve(name: object) -> Any:
    try:
        return operators.resolve(str(name))
    except KeyError:
        raise UsageError(
            "a stored graph may call the operators of gdfq.graph.operators.ALLOWED; this one calls "
            f"{name!r}. Do not use the file unless you know where it comes from."
        ) from None


def _broken(reason: str) -> UsageError:
    return UsageError(f"the stored graph is damaged: {reason}. Make it again with gdfq quantize.")
