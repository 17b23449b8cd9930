"""Modules that only wrap a network: for several devices, for compiling, for averaging weights."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from gdfq.errors import UsageError

_PARALLEL = (nn.DataParallel, DistributedDataParallel, AveragedModel)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the network inside wrappers that compute what it computes.

    These are DataParallel, DistributedDataParallel, FullyShardedDataParallel, what `torch.compile`
    returns, AveragedModel, and modules without a forward of their own that only hold a network as
    `module`, such as timm's ModelEmaV2.

    Raises:
        UsageError: It is TorchScript, or its parameters are spread over processes.
    """
    while (inner := _inner(model)) is not None:
        model = inner
    if isinstance(model, torch.jit.ScriptModule):
        raise UsageError(
            "a network must be a PyTorch module; this is a TorchScript module, whose code is fixed "
            "and cannot be traced again. Give the module that it was made from; its weights are "
            "scripted.state_dict()."
        )
    for name, tensor in model.named_parameters():
        if type(tensor.data).__name__ == "DTensor" or _is_flat_shard(name):
            raise UsageError(
                f"weights must be whole; {name!r} is spread over processes "
                "(FSDP). Gather a full state dict and load it into a plain module."
            )
    return model


def described(model: object) -> str:
    """What was given in the place of a network, for people, and what to do with it."""
    if isinstance(model, Mapping):
        return (
            "a state dict, which holds weights alone. Load it into the network first "
            "(load_state_dict), and give the network"
        )
    return f"a {type(model).__name__}"


def unwrap_inside_(model: nn.Module) -> nn.Module:
    """Replace wrapped networks inside a private copy of a network by the networks."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            inner = child
            while (found := _inner(inner)) is not None:
                inner = found
            if inner is not child:
                module._modules[name] = inner
    return model


def _inner(model: nn.Module) -> nn.Module | None:
    """What a wrapper holds, or None for a network."""
    if isinstance(model, torch.jit.ScriptModule):
        return None
    if isinstance(model, _PARALLEL) or type(model).__name__ == "FullyShardedDataParallel":
        inner: Any = model.module
        return inner if isinstance(inner, nn.Module) else None
    if isinstance(compiled := model._modules.get("_orig_mod"), nn.Module):
        return compiled
    has_forward = type(model).forward is not nn.Module.forward
    if list(model._modules) == ["module"] and not has_forward and not model._parameters:
        return model._modules["module"]
    return None


def _is_flat_shard(name: str) -> bool:
    return name.rpartition(".")[2] == "_flat_param"
