"""Progress of a run: every step is passed to listeners, which print or record it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Step:
    """One step of a stage: index counts from 1 to total; losses are scalars."""

    stage: str
    index: int
    total: int
    losses: Mapping[str, Tensor]
    rate: float | None = None
    """The learning rate, relative to the initial rate of the stage."""
    ranges: Mapping[str, float] = field(default_factory=dict)
    """The range of each activation's grid by name; empty in most steps (see `RANGE_REPORTS`)."""


Listener = Callable[[Step], None]

RANGE_REPORTS = 50
"""Approximate number of steps of a stage that report the ranges of activations."""


def is_due(index: int, total: int, times: int) -> bool:
    """Return whether a stage reports at a step: about `times` times, and at the last step.

    Args:
        index: The step, counted from 1.
        total: Steps of the stage.
        times: Approximate number of reports.
    """
    return index % max(1, total // times) == 0 or index == total


def silent(step: Step) -> None:
    """The listener that does nothing."""
