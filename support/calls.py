"""What networks are called with."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, fx, nn


@contextmanager
def rows_of_calls() -> Iterator[list[int]]:
    """The entries of the first input of each call of a graph, in order."""
    found: list[int] = []

    def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(module, fx.GraphModule) and inputs and isinstance(inputs[0], Tensor):
            found.append(len(inputs[0]))

    handle = nn.modules.module.register_module_forward_pre_hook(note)
    try:
        yield found
    finally:
        handle.remove()
