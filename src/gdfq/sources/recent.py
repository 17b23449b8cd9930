"""The most recent images of a stream, for the report."""

from collections import deque
from collections.abc import Sequence
from math import prod

from torch import Tensor

from gdfq.files.states import Frozen
from gdfq.sources.base import Batch, first_inputs

IMAGES, _MAX_ELEMENTS = 256, 2**24
"""Maximum images that are stored, and maximum elements of them together (64 MiB: 111 images of
3x224x224)."""


class Recent:
    """Keeps the last images of the batches that it receives.

    Attributes:
        parts: The attributes of the batches that have them, the newest last.
    """

    def __init__(self) -> None:
        self.parts: deque[Frozen] = deque()

    def see_(self, part: Frozen) -> None:
        """Keep a batch, given as its attributes, and drop those that are no longer needed."""
        self.parts.append(part)
        kept = self._batches()
        count, most = sum(map(len, kept)), max_images(kept[-1].inputs)
        for batch in kept:
            count -= len(batch)
            if count < most:
                break
            self.parts.popleft()

    def inputs(self) -> tuple[tuple[Tensor, ...], Tensor | None] | None:
        """Return a tensor [N, *shape] for each input, newest batch first, and labels [N], if any.

        Returns None before the first batch.
        """
        if not self.parts:
            return None
        kept = self._batches()
        return first_inputs(max_images(kept[-1].inputs), reversed(kept))

    def _batches(self) -> list[Batch]:
        return [Batch(**part.value) for part in self.parts]


def max_images(inputs: Sequence[Tensor]) -> int:
    """Return how many entries of inputs [N, *shape] are kept."""
    numbers = sum(prod(tensor.shape[1:]) for tensor in inputs)
    return max(1, min(IMAGES, _MAX_ELEMENTS // numbers))
