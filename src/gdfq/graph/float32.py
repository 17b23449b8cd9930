"""Exported graphs in float32: without half and double precision inside."""

from typing import Any

import torch
from torch import Tensor, fx, nn

from gdfq.graph import operators
from gdfq.graph.fakes import evaluate_
from gdfq.graph.tensors import attribute, set_attribute_

_OTHER_TYPES = frozenset({torch.float64, torch.float16, torch.bfloat16})


def to_float32_(module: fx.GraphModule) -> torch.dtype:
    """Make an exported graph compute in float32 wherever it computes in another float type.

    Returns:
        The type of the lowest precision that it had.
    """
    graph = module.graph
    found = {
        part.dtype
        for node in graph.nodes
        for part in _tensors(node.meta.get("val"))
        if part.dtype in _OTHER_TYPES
    }
    if not found:
        return torch.float32
    for node in graph.nodes:
        if node.op == "get_attr":
            tensor = attribute(module, str(node.target))
            if tensor.dtype in _OTHER_TYPES:
                made = tensor.detach().float()
                kept = nn.Parameter(made) if isinstance(tensor, nn.Parameter) else made
                set_attribute_(module, str(node.target), kept)
                node.meta["val"] = node.meta["val"].float()
        elif node.op == "call_function":
            node.args = tuple(map(_in_32, node.args))
            node.kwargs = {name: _in_32(value) for name, value in node.kwargs.items()}
            evaluate_(node)
            if operators.name_of(node) in operators.CASTS and _does_nothing(node):
                node.replace_all_uses_with(node.all_input_nodes[0])
    graph.eliminate_dead_code()
    return max(found, key=lambda dtype: torch.finfo(dtype).eps)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [part for part in value if isinstance(part, Tensor)] if _is_several(value) else []


def _is_several(value: Any) -> bool:
    return isinstance(value, tuple | list)


def _in_32(value: Any) -> Any:
    return torch.float32 if isinstance(value, torch.dtype) and value in _OTHER_TYPES else value


def _does_nothing(node: fx.Node) -> bool:
    (source,) = node.all_input_nodes
    return bool(node.meta["val"].dtype == source.meta["val"].dtype)
