"""Sources of images. Each is a frozen value whose `stream` yields batches for the student."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from gdfq.execution.context import Context
from gdfq.execution.distributed import Group
from gdfq.graph.capture import Captured


@dataclass(frozen=True)
class Batch:
    """What the student sees in one step, detached, on the teacher's device.

    inputs: one tensor [N, *shape] for each input of the network; images are in the network's
    normalised input space, channels_last;
    labels [N] integers, or None for a network whose outputs are not classes; teacher_logits
    [N, C], or None where the teacher has not seen these very images or has no classes; losses:
    scalars for the log.
    """

    inputs: tuple[Tensor, ...]
    labels: Tensor | None
    teacher_logits: Tensor | None
    losses: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def images(self) -> Tensor:
        """The images [N, *input_shape] of a network that takes images alone."""
        (images,) = self.inputs
        return images

    def __len__(self) -> int:
        return len(self.inputs[0])

    def part(self, group: Group) -> "Batch":
        """The images that are this process's."""

        def rows(x: Tensor | None) -> Tensor | None:
            return None if x is None else group.part(x)

        inputs = tuple(map(group.part, self.inputs))
        return Batch(inputs, rows(self.labels), rows(self.teacher_logits), self.losses)

    def split(self, size: int) -> list["Batch"]:
        """Parts of about equal length, of `size` images or fewer each."""
        parts = max(1, -(-len(self) // size))
        inputs = list(zip(*(tensor.chunk(parts) for tensor in self.inputs), strict=True))

        def chunks(tensor: Tensor | None) -> Sequence[Tensor | None]:
            return [None] * len(inputs) if tensor is None else tensor.chunk(parts)

        return [
            Batch(part, labels, logits, self.losses)
            for part, labels, logits in zip(
                inputs, chunks(self.labels), chunks(self.teacher_logits), strict=True
            )
        ]


def labels_in_turn(teacher: Captured, step: int, batch: int) -> Tensor | None:
    """Labels [batch] of the step-th batch when batches cover the classes in turn, on the device.

    Batches of fewer images than there are classes take them from all over, for neighbours are
    often alike, as ImageNet's dogs are. None for a teacher whose outputs are not classes.
    """
    classes = teacher.classes
    if classes is None:
        return None
    apart = -(-classes // batch)
    order = torch.cat([torch.arange(first, classes, apart) for first in range(apart)])
    return order[(torch.arange(batch) + step * batch) % classes].to(teacher.device)


def first_images(count: int, made: Iterable[Batch]) -> tuple[Tensor, Tensor | None]:
    """The first `count` images of some batches, and their labels if they have any."""
    batches = list(made)
    images = torch.cat([batch.images for batch in batches])[:count]
    labels = [batch.labels for batch in batches if batch.labels is not None]
    return images, torch.cat(labels)[:count] if labels else None


class Source(Protocol):
    """Anything that can supply images: generated, optimised or real, all interchangeable."""

    @property
    def batch(self) -> int:
        """Images a batch."""
        ...

    def stream(
        self,
        teacher: Captured,
        *,
        steps: int,
        context: Context = Context(),
    ) -> Iterator[Batch]:
        """Yield `steps` batches; the same seed gives the same batches.

        The listener hears of work that is done before a batch can be yielded. All processes of a
        group call this alike and get the same, whole batches, which they may make together.
        """
        ...
