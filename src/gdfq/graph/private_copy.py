"""A private copy of a user's network: on the CPU, in float32, with state of its own.

`copy.deepcopy` refuses networks that hold computed tensors (weight norm, pruning, features that a
hook keeps), locks, threads or files, and it leaves functions bound to the original: a hook that
appends to a list, or a lambda that calls a layer, would still change or use the user's network.
This copy takes the tensors, modules and containers, gives functions the copies of what they refer
to, and shares only what cannot be copied.
"""

import copy
import functools
import types
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, fx, nn

from gdfq.graph.wrappers import unwrap_inside_


def private_copy(model: nn.Module) -> nn.Module:
    """Return an independent copy of a network in evaluation mode, on the CPU, in float32.

    Tensors are detached. Running the copy changes neither tensors nor attributes of the original,
    nor what its hooks keep. Objects that cannot be copied, such as locks and files, are shared.
    """
    copier = _Copier()
    for tensor in (*model.parameters(), *model.buffers()):
        copier.copy(tensor)
    # All modules are known before their attributes are copied, which may refer to any of them.
    compiled = [module for module in model.modules() if isinstance(module, _COMPILED)]
    inside = {part for module in compiled for part in module.modules()}  # copied with it
    modules = [module for module in model.modules() if module not in inside]
    for module in modules:
        copier.open(module)
    for module in modules:
        copier.fill(module)
    copied: nn.Module = copier.copy(model)
    for module in copied.modules():
        _rename_hidden_(module)
    return unwrap_inside_(copied).eval()


def _rename_hidden_(module: nn.Module) -> None:
    """Rename submodules with the name of a method, which only a loop over the submodules finds."""
    hidden = [name for name in module._modules if hasattr(type(module), name)]
    if not hidden:
        return
    names = {name: name for name in module._modules}
    for name in hidden:
        while names[name] in module._modules or hasattr(module, names[name]):
            names[name] += "_"
    parts = {names[name]: part for name, part in module._modules.items()}
    module._modules.clear()
    module._modules.update(parts)


_COMPILED = (fx.GraphModule, torch.jit.ScriptModule)
"""Modules that make their code again when they are copied."""
_CONTAINERS = (list, dict, set, tuple)
_CELLS = (*_CONTAINERS, Tensor, nn.Module)
"""Values that a function may refer to and that belong to a network."""
_ATOMS = (
    *(int, float, complex, str, bytes, type(None), type, range, slice, types.ModuleType),
    *(types.BuiltinFunctionType, torch.dtype, torch.memory_format, torch.layout),
)
"""Values that never change."""


class _Copier:
    """Copies values; each value has one copy."""

    def __init__(self) -> None:
        self._copies: dict[int, Any] = {}
        """Copies by the id of the original, in the form of `copy.deepcopy`."""
        self._originals: list[Any] = []
        """Keeps the originals alive, so that their ids stay theirs."""

    def copy(self, value: Any) -> Any:
        """Return the copy of a value."""
        if isinstance(value, _ATOMS):
            return value
        if id(value) in self._copies:
            return self._copies[id(value)]
        made = self._copy_of(value)
        return made if id(value) in self._copies else self._remember(value, made)

    def open(self, module: nn.Module) -> None:
        """Make the copy of a module, still without attributes."""
        self._remember(module, type(module).__new__(type(module)))

    def fill(self, module: nn.Module) -> None:
        """Copy the attributes of a module."""
        made = self._copies[id(module)]
        for name, part in vars(module).items():
            made.__dict__[name] = self.copy(part)

    def _remember(self, value: Any, made: Any) -> Any:
        self._copies[id(value)] = made
        self._originals.append(value)
        return made

    def _copy_of(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return _tensor(value)
        if isinstance(value, torch.device):
            return torch.device("cpu")
        if isinstance(value, nn.Module):
            return self._module(value)
        if isinstance(value, _CONTAINERS):
            return self._container(value)
        if isinstance(value, functools.partial):
            keywords = {name: self.copy(part) for name, part in value.keywords.items()}
            return functools.partial(self.copy(value.func), *map(self.copy, value.args), **keywords)
        if isinstance(value, types.MethodType):
            return types.MethodType(value.__func__, self.copy(value.__self__))
        if isinstance(value, types.FunctionType):
            return self._function(value)
        return self._object(value)

    def _module(self, module: nn.Module) -> Any:
        if isinstance(module, _COMPILED):
            return copy.deepcopy(module, self._copies)._apply(_prepared)
        self.open(module)  # one that the network holds apart from its submodules
        self.fill(module)
        return self._copies[id(module)]

    def _container(self, value: Any) -> Any:
        if isinstance(value, tuple):
            parts = [self.copy(part) for part in value]
            if all(new is old for new, old in zip(parts, value, strict=True)):
                return value
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        if not isinstance(value, dict) and type(value) not in (list, set):
            return self._object(value)
        made = self._remember(value, copy.copy(value))  # also of subclasses, such as OrderedDict
        made.clear()
        if isinstance(value, dict):
            for key, part in value.items():
                made[self.copy(key)] = self.copy(part)
        elif isinstance(value, list):
            made.extend(map(self.copy, value))
        else:
            made.update(map(self.copy, value))
        return made

    def _function(self, function: types.FunctionType) -> Any:
        """Return a function that refers to copies, or the function itself if it needs none."""
        names = set(function.__code__.co_names)
        variables = {
            name: value
            for name, value in function.__globals__.items()
            if name in names and isinstance(value, _CELLS)
        }
        cells = function.__closure__ or ()
        if not variables and not cells and not function.__defaults__ and not vars(function):
            return function
        new_cells = tuple(types.CellType() for _ in cells)
        made = types.FunctionType(
            function.__code__,
            function.__globals__ | {name: self.copy(v) for name, v in variables.items()}
            if variables
            else function.__globals__,
            function.__name__,
            self.copy(function.__defaults__) if function.__defaults__ else None,
            new_cells,
        )
        self._remember(function, made)
        made.__kwdefaults__ = self.copy(function.__kwdefaults__)
        made.__dict__.update(function.__dict__)
        for new, cell in zip(new_cells, cells, strict=True):
            try:
                new.cell_contents = self.copy(cell.cell_contents)
            except ValueError:  # not assigned yet
                continue
        return made

    def _object(self, value: Any) -> Any:
        """Return a deep copy, else an object with copies of the attributes, else the value."""
        trial = dict(self._copies)
        with suppress(Exception):  # any: classes say how they are copied
            made = copy.deepcopy(value, trial)
            self._originals += trial.pop(id(trial), [])
            self._copies.update(trial)
            return made
        attributes = getattr(value, "__dict__", None)
        if attributes is None or not _is_plain(type(value)):
            return value
        made = self._remember(value, object.__new__(type(value)))
        for name, part in attributes.items():
            made.__dict__[name] = self.copy(part)
        return made


def _is_plain(kind: type) -> bool:
    """Return whether objects of a class consist of their attributes alone."""
    own = getattr(kind, "__new__", None)
    return own is object.__new__ and kind.__module__ not in {"threading", "_thread"}


def _prepared(tensor: Tensor) -> Tensor:
    """Return a detached copy on the CPU, float32 where it is real."""
    tensor = tensor.detach().cpu()
    copied = tensor.clone()
    return copied.float() if copied.is_floating_point() else copied


def _tensor(tensor: Tensor) -> Tensor:
    made = _prepared(tensor)
    # With gradients, PyTorch does not replace attention by one operator that is for inference.
    trains = made.is_floating_point()
    return nn.Parameter(made, trains) if isinstance(tensor, nn.Parameter) else made
