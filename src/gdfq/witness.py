"""What a run sees on its way and forgets otherwise: evidence for its report is gathered from it."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod

from torch import Tensor

from gdfq.capture import Captured
from gdfq.data import ImageData
from gdfq.evaluate import Answers
from gdfq.progress import Listener, silent
from gdfq.sources import Batch, Source
from gdfq.sources.pool import first_images

IMAGES, _NUMBERS = 256, 2**24
"""So many of the student's last images are kept, as far as they hold no more numbers than that
(64 MiB: 111 images of 3x224x224)."""


@dataclass(frozen=True, eq=False)
class Tested:
    """Test images, and what teacher and student answered to them."""

    data: ImageData
    labels: Tensor
    teacher: Answers
    student: Answers


@dataclass(frozen=True, eq=False)
class Witness:
    """Images that the student saw last [N, *input_shape], their labels [N], and test answers.

    labels are None for a network without classes, `tested` where there was nothing to test on.
    """

    images: Tensor
    labels: Tensor | None
    tested: Tested | None


@dataclass(eq=False)
class Remembering:
    """A source that passes another one's batches on and remembers the last ones."""

    source: Source
    _last: list[Batch] = field(default_factory=list)

    @property
    def batch(self) -> int:
        return self.source.batch

    def stream(
        self, teacher: Captured, *, steps: int, seed: int, listener: Listener = silent
    ) -> Iterator[Batch]:
        """Yield the source's batches; raises at once what it does."""
        batches = self.source.stream(teacher, steps=steps, seed=seed, listener=listener)
        return self._remembered(batches, _few_enough(teacher))

    def _remembered(self, batches: Iterator[Batch], enough: int) -> Iterator[Batch]:
        for batch in batches:
            self._last.append(batch)
            while sum(len(kept.images) for kept in self._last[1:]) >= enough:
                del self._last[0]
            yield batch

    def witness(self, teacher: Captured, tested: Tested | None) -> Witness:
        """What was seen of the last stream, and of the test."""
        images, labels = first_images(_few_enough(teacher), reversed(self._last))
        return Witness(images, labels, tested)


def _few_enough(teacher: Captured) -> int:
    return max(1, min(IMAGES, _NUMBERS // prod(teacher.input_shape)))
