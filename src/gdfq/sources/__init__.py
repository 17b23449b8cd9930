"""Sources of images. Each is a frozen value whose `stream` yields batches for the student."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from gdfq.capture import Captured
from gdfq.progress import Listener, silent


@dataclass(frozen=True)
class Batch:
    """What the student sees in one step, detached, on the teacher's device.

    images [N, *input_shape] in the network's normalised input space, channels_last;
    labels [N] integers; teacher_logits [N, C], or None where the teacher has not seen these very
    images; losses: scalars for the log.
    """

    images: Tensor
    labels: Tensor
    teacher_logits: Tensor | None
    losses: Mapping[str, Tensor] = field(default_factory=dict)

    def split(self, size: int) -> list["Batch"]:
        """Parts of about equal length, of `size` images or fewer each."""
        parts = max(1, -(-len(self.images) // size))
        logits = self.teacher_logits
        return [
            Batch(images, labels, known, self.losses)
            for images, labels, known in zip(
                self.images.chunk(parts),
                self.labels.chunk(parts),
                [None] * parts if logits is None else logits.chunk(parts),
                strict=False,
            )
        ]


class Source(Protocol):
    """Anything that can supply images: generated, optimised or real, all interchangeable."""

    @property
    def batch(self) -> int:
        """Images a batch."""
        ...

    def stream(
        self, teacher: Captured, *, steps: int, seed: int, listener: Listener = silent
    ) -> Iterator[Batch]:
        """Yield `steps` batches; the same seed gives the same batches.

        The listener hears of work that is done before a batch can be yielded.
        """
        ...
