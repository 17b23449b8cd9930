"""What a run says while it runs: steps go to listeners, which print or record them."""

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
    """The learning rate, as a share of the one that the stage begins with."""
    ranges: Mapping[str, float] = field(default_factory=dict)
    """Now and then, how much each activation's grid spans, by name."""


Listener = Callable[[Step], None]

RANGES = 50
"""How often a stage tells the activations' ranges."""


def is_due(index: int, total: int, times: int) -> bool:
    """Whether to speak at step `index` (from 1) of `total`: about `times` times, and at the end."""
    return index % max(1, total // times) == 0 or index == total


def silent(step: Step) -> None:
    """The listener that does nothing."""
