"""Torch checkpoints as training scripts save them, read without running code.

Beside a state dict they hold optimizer states, NumPy numbers, paths and options. Each object of a
class that a state dict does not need is read as an inert placeholder: its class is not imported and
nothing of it is called.
"""

import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from gdfq.files.untrusted import foreign_names

_LOCK = threading.Lock()
"""The list of placeholders is one of torch's, for the whole process."""

_MAX_CONTAINERS = 50
"""Maximum classes of containers in a checkpoint: each is found out by a failed reading."""


class Placeholder:
    """Stands for an object of a class that is not imported."""

    def __new__(cls, *_: object, **__: object) -> "Placeholder":
        return object.__new__(cls)

    def __init__(self, *_: object, **__: object) -> None:
        self.state: Any = None

    def __setstate__(self, state: object) -> None:
        self.state = state


class _DictLike:
    """Stands for a dictionary of a class that is not imported."""

    def __new__(cls, *_: object, **__: object) -> Any:
        return OrderedDict()


class _ListLike:
    """Stands for a list or a queue of a class that is not imported."""

    def __new__(cls, *_: object, **__: object) -> Any:
        return []


def read_checkpoint(path: Path) -> Any:
    """Read what a torch file holds, with placeholders for objects of other classes.

    Raises:
        ValueError: It calls something that no checkpoint needs, or could take memory without end.
        Exception: torch cannot read it with weights_only.
    """
    bases: dict[str, type] = dict.fromkeys(sorted(foreign_names(path)), Placeholder)
    for _ in range(_MAX_CONTAINERS):
        kinds = [(type(name, (base,), {}), name) for name, base in bases.items()]
        try:
            with _LOCK, torch.serialization.safe_globals(kinds):  # type: ignore[arg-type]
                return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            # Which class is a dictionary or a list shows when something is put into it.
            told = str(error)
            waiting = (name for name, base in bases.items() if base is Placeholder)
            name = next((name for name in waiting if f"{name}'>" in told), None)
            if name is None:
                raise
            bases[name] = _ListLike if "Can only append" in told or "extend" in told else _DictLike
    raise ValueError(f"it holds {_MAX_CONTAINERS} kinds of containers or more")


def pickled_module(value: object) -> str | None:
    """The class of a whole pickled module that a placeholder stands for, or None."""
    if not isinstance(value, Placeholder) or not isinstance(value.state, dict):
        return None
    return type(value).__name__ if "_modules" in value.state else None
