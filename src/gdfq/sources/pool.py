"""A pool of images that is made once and drawn from again and again, augmented."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor

from gdfq.capture import Captured
from gdfq.progress import Listener, silent
from gdfq.randomness import stream as random_stream
from gdfq.sources import Batch, Source


@dataclass(frozen=True)
class ImagePool:
    """Batches from the first `images` images of another source, in a new order each epoch.

    Each batch is shifted by up to an eighth of the image's side and flipped at random, all its
    images alike, unless `augmented` is False. The last batch of an epoch is left out when it is
    smaller than the others.
    """

    source: Source
    images: int
    batch: int
    augmented: bool = True

    def stream(
        self, teacher: Captured, *, steps: int, seed: int, listener: Listener = silent
    ) -> Iterator[Batch]:
        """Yield `steps` batches; raises at once what the source does."""
        needed = -(-self.images // self.source.batch)
        made = self.source.stream(teacher, steps=needed, seed=seed, listener=listener)
        return self._batches(made, steps, seed)

    def made(
        self, teacher: Captured, *, seed: int, listener: Listener = silent
    ) -> tuple["ImagePool", Tensor]:
        """The same pool with its images made, and these [images, *input_shape].

        For the same seed it streams the same batches as before.
        """
        images, labels = collect(self.source, teacher, self.images, seed=seed, listener=listener)
        return replace(self, source=StoredImages(images, labels, self.source.batch)), images

    def _batches(self, made: Iterator[Batch], steps: int, seed: int) -> Iterator[Batch]:
        images, labels = first_images(self.images, made)
        draw = random_stream(seed, "pool.order")
        size = min(self.batch, len(images))
        pending: list[Tensor] = []
        for _ in range(steps):
            if not pending:
                order = torch.randperm(len(images), generator=draw)
                pending = [part for part in order.split(size) if len(part) == size]
            chosen = pending.pop()
            drawn = images[chosen]
            if self.augmented:
                drawn = shifted_and_flipped(drawn, draw)
            yield Batch(drawn, None if labels is None else labels[chosen], None)


@dataclass(frozen=True, eq=False)
class StoredImages:
    """Images that were made before, in their order: [N, *input_shape] and their labels [N]."""

    images: Tensor
    labels: Tensor | None
    batch: int

    def stream(
        self, teacher: Captured, *, steps: int, seed: int, listener: Listener = silent
    ) -> Iterator[Batch]:
        """Yield `steps` batches, or as many as there are; the last may be smaller."""
        batch = Batch(self.images, self.labels, None)
        yield from islice(batch.split(self.batch), steps)


def collect(
    source: Source, teacher: Captured, count: int, *, seed: int, listener: Listener = silent
) -> tuple[Tensor, Tensor | None]:
    """The first `count` images of a source [count, *input_shape] and their labels [count].

    The labels are None for a teacher whose outputs are not classes.
    """
    steps = -(-count // source.batch)
    return first_images(count, source.stream(teacher, steps=steps, seed=seed, listener=listener))


def first_images(count: int, made: Iterable[Batch]) -> tuple[Tensor, Tensor | None]:
    """The first `count` images of some batches, and their labels if they have any."""
    batches = list(made)
    images = torch.cat([batch.images for batch in batches])[:count]
    labels = [batch.labels for batch in batches if batch.labels is not None]
    return images, torch.cat(labels)[:count] if labels else None


def shifted_and_flipped(images: Tensor, draw: torch.Generator) -> Tensor:
    """The images [N, C, *size] moved by up to size/8 along each axis, mirrored at the borders.

    Those of two dimensions are also flipped from left to right half of the time.
    """
    size = images.shape[2:]
    reach = [side // 8 for side in size]
    offsets = [int(torch.randint(2 * r + 1, (1,), generator=draw)) for r in reach]
    if any(reach):
        padding = [r for r in reversed(reach) for _ in range(2)]
        images = F.pad(images, padding, mode="reflect")
        for dim, (offset, side) in enumerate(zip(offsets, size, strict=True), start=2):
            images = images.narrow(dim, offset, side)
    if len(size) == 2 and int(torch.randint(2, (1,), generator=draw)):
        images = images.flip(-1)
    layout = torch.channels_last if images.ndim == 4 else torch.contiguous_format
    return images.contiguous(memory_format=layout)
