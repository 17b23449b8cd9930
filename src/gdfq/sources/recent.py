"""The most recent images of a stream, for the report."""

from collections import deque
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from gdfq.files.states import Frozen
from gdfq.sources.base import Batch, first_inputs

IMAGES, _MAX_ELEMENTS = 256, 2**24
"""Maximum images that are stored, and maximum elements of them together (64 MiB: 111 images of
3x224x224)."""


class Recent:
    """Keeps the last images of the batches that it receives."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._batches: deque[Batch] = deque()

    def see_(self, batch: Batch) -> None:
        """Keep a batch, and drop those that are no longer needed."""
        self._batches.append(batch)
        while sum(len(kept) for kept in self._batches) - len(self._batches[0]) >= _max_images(
            batch.inputs
        ):
            self._batches.popleft()

    def inputs(self) -> tuple[tuple[Tensor, ...], Tensor | None] | None:
        """Return a tensor [N, *shape] for each input, newest batch first, and labels [N], if any.

        Returns None before the first batch.
        """
        if not self._batches:
            return None
        return first_inputs(_max_images(self._batches[-1].inputs), reversed(self._batches))

    def state_dict(self) -> dict[str, Any]:
        return {"batches": [vars(batch) for batch in self._batches]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        found = Frozen(state["batches"]).to(self._device).value
        self._batches = deque(Batch(**values) for values in found)


def _max_images(inputs: Sequence[Tensor]) -> int:
    numbers = sum(prod(tensor.shape[1:]) for tensor in inputs)
    return max(1, min(IMAGES, _MAX_ELEMENTS // numbers))
