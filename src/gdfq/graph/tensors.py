"""The tensors of graph modules, and modules with only the tensors that their graph refers to."""

import torch
from torch import Tensor, fx, nn


def flat_module(graph: fx.Graph, tensors: dict[str, Tensor]) -> fx.GraphModule:
    """Return a graph module with copies of `tensors`, channels_last and without gradients."""

    def prepared(tensor: Tensor) -> Tensor:
        layout = torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
        copied = tensor.detach().clone(memory_format=layout)
        is_parameter = isinstance(tensor, nn.Parameter)
        return nn.Parameter(copied, requires_grad=False) if is_parameter else copied

    used = [str(node.target) for node in graph.nodes if node.op == "get_attr"]
    unique = {id(tensors[name]): prepared(tensors[name]) for name in used}
    return fx.GraphModule({name: unique[id(tensors[name])] for name in used}, graph)


def tensors_of(module: fx.GraphModule) -> dict[str, Tensor]:
    """Return the tensors that a graph refers to, by name."""
    names = [str(node.target) for node in module.graph.nodes if node.op == "get_attr"]
    return {name: attribute(module, name) for name in names}


def attribute(module: nn.Module, name: str) -> Tensor:
    """Return the tensor at a dotted path of a module."""
    value: object = module
    for part in name.split("."):
        value = getattr(value, part)
    assert isinstance(value, Tensor)
    return value


def set_attribute_(module: nn.Module, name: str, value: Tensor) -> None:
    """Replace the tensor at a dotted path of a module."""
    path, _, leaf = name.rpartition(".")
    holder = module.get_submodule(path)
    delattr(holder, leaf)
    setattr(holder, leaf, value)
