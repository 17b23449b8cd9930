"""The context of a run: what every stage runs with."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, get_args

import torch

from gdfq.errors import UsageError
from gdfq.execution.budget import MemoryBudget
from gdfq.execution.checkpointer import Checkpointer, NullCheckpointer
from gdfq.execution.distributed import ALONE, Group
from gdfq.execution.precision import Precision
from gdfq.execution.progress import Listener, silent


@dataclass(frozen=True, kw_only=True)
class Context:
    """What every stage of a run receives.

    Attributes:
        seed: Seed of all random streams.
        listener: Receives each step.
        group: The processes that share the work.
        checkpointer: Registers the parts that a resumed run needs.
        precision: Precision of the products in layers, of teacher and student, while images are
            made and the student is tuned.
        memory: What the activations of images that pass a network together may take.

    Raises:
        UsageError: There is no such precision, or the listener or the group is something else.
    """

    seed: int = 0
    listener: Listener = silent
    group: Group = ALONE
    checkpointer: Checkpointer = NullCheckpointer()  # noqa: RUF009 (it has no state)
    precision: Precision = "float32"
    memory: MemoryBudget = MemoryBudget()

    def __post_init__(self) -> None:
        if self.precision not in get_args(Precision):
            raise UsageError(
                f"precision must be {' or '.join(get_args(Precision))}; got {self.precision!r}."
            )
        if not callable(self.listener):
            raise UsageError(
                f"listener must be a function that takes a step; got {self.listener!r}."
            )
        if not isinstance(self.group, Group):
            raise UsageError(
                f"group must be what gdfq.execution.distributed.joined gives; got {self.group!r}."
            )

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """Return a context manager in which layers compute in `precision`."""
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(device.type, getattr(torch, self.precision))
