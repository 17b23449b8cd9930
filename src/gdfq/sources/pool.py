"""A pool: images are made once, and batches are drawn from them and augmented."""

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, Self, cast

from torch import Tensor

from gdfq.errors import GdfqWarning, UsageError
from gdfq.execution.context import Context
from gdfq.execution.seeding import stream as random_stream
from gdfq.files.plain_values import tagged
from gdfq.files.states import Results, Stateful
from gdfq.graph.capture import Captured
from gdfq.graph.inputs import takes_images
from gdfq.sources.augment import (
    CONSISTENT_SHARE,
    Move,
    moved,
    prediction_consistency,
    random_move,
    spread,
)
from gdfq.sources.base import Batch, Source, first_images
from gdfq.sources.candidates import Candidates, Screening
from gdfq.sources.collected import Collected, keeps_half
from gdfq.sources.screen import screened
from gdfq.sources.stream import Shuffled, Stream

_MAX_BATCH_PIXELS = 2**21
"""Maximum pixels of the images that are made together. Fewer images have worse statistics."""


@tagged("ImagePool", added={"candidates": None, "places": 0})
@dataclass(frozen=True)
class ImagePool(Source):
    """Batches from the first `images` images of another source, in a new order for each epoch.

    Large images cost more, and fewer of them suffice. A pool takes only as many batches of the
    source as have `pixels` pixels together, but at least one. No batch has more than 2^21 pixels:
    32 images of 224x224, whose statistics are as good as those of more images. The batches of the
    pool shrink in proportion, to the next power of two, so that processes can divide them.

    If the teacher's predictions are consistent under augmentation (`gdfq.sources.augment`), each
    batch is shifted by up to an eighth of the image's side and flipped at random; all its images
    share one shift and flip. The last batch of an epoch is left out if it is smaller than the
    others.

    Attributes:
        source: Makes the images.
        images: Number of images.
        batch: Images per batch.
        augmented: Whether batches may be shifted and flipped.
        pixels: Maximum pixels of all images together; None for no limit.
        candidates: Images from elsewhere, of which a screen adds some to the pool
            (`gdfq.sources.candidates`).
        places: Maximum number of these images.
    """

    source: Source
    images: int
    batch: int
    augmented: bool = True
    pixels: int | None = None
    candidates: Candidates | None = None
    places: int = 0

    def fitted(self, input_shape: Sequence[int]) -> "ImagePool":
        """Return this pool with as many images, and images per batch, as the inputs allow."""
        if self.pixels is None:
            return self
        of_image = math.prod(input_shape[1:])
        room = self.pixels // of_image
        at_once = min(
            self.source.batch, 1 << max(1, _MAX_BATCH_PIXELS // of_image).bit_length() - 1
        )
        images = min(self.images, max(1, room // at_once) * at_once)
        share = -(-self.batch * images // self.images)
        batch = min(self.batch, images, 1 << (share - 1).bit_length())
        source = self.source.with_batch(at_once)
        return replace(self, source=source, images=images, batch=batch, pixels=None)

    @property
    def most_at_once(self) -> int:
        """Images of the largest batch: of this pool, or of the source that fills it."""
        return max(self.batch, self.source.most_at_once)

    @property
    def images_held(self) -> int:
        """Images that stay in memory: all of them."""
        return self.images + self.places

    @property
    def images_made(self) -> int:
        """Images that its source makes before the student learns; 0 if they are given."""
        return 0 if self.source.iterations is None else self.images

    @property
    def iterations(self) -> int | None:
        """Updates of each image by the source that fills it."""
        return self.source.iterations

    @property
    def within_limits(self) -> bool:
        """Whether the images of the source that fills it only have values that pixels have."""
        return self.source.within_limits

    def with_batch(self, batch: int) -> Self:
        """Return this pool with `batch` images per batch, of its own and of its source."""
        return replace(self, batch=batch, source=self.source.with_batch(batch))

    def with_images(self, images: int, *, once: bool = False) -> Self:
        """Return this pool with `images` images, which its source makes in batches of equal size.

        Args:
            images: Number of images.
            once: Whether all batches of an epoch get one size: hardly any image is left out.

        Raises:
            UsageError: The images are given.
        """
        if self.source.iterations is None:
            raise UsageError(
                "a number of images is for recipes that make them; this one takes all that you "
                f"give with --data (data=...). Give --data and remove images; got images {images}."
            )
        batches = -(-images // self.source.batch)
        source = self.source.with_batch(-(-images // batches))
        batch = images // -(-images // self.batch) if once else self.batch
        return replace(self, images=images, batch=batch, source=source)

    def with_iterations(self, iterations: int) -> Self:
        """Return this pool with `iterations` updates of each image by its source."""
        return replace(self, source=self.source.with_iterations(iterations))

    def on(self, given: Source, count: int) -> "ImagePool":
        """Return this pool with all given images in it."""
        source = given.with_batch(self.batch)
        return replace(self, source=source, images=count, pixels=None)

    def with_candidates(self, candidates: Candidates, places: int) -> "ImagePool":
        """Return this pool with at most `places` of the candidates in it."""
        return replace(self, candidates=candidates, places=min(places, len(candidates)))

    def screening_of(self, stream: Iterator[Batch]) -> Screening | None:
        """Return what the screen found for a stream of this pool; None before its first batch."""
        return cast(PoolStream, stream).screening

    def bulk(self, steps: int) -> tuple[Source, int]:
        """Return the source that fills this pool, and how many batches that takes."""
        del steps
        return self.source, -(-self.images // self.source.batch)

    def make_images(
        self,
        teacher: Captured,
        count: int,
        *,
        steps: int | None,
        planned: int,
        context: Context = Context(),
    ) -> tuple[Tensor, Tensor | None]:
        """Return the first `count` images that fill this pool, and their labels, if any.

        Raises:
            UsageError: `steps` was given; each image is made once, whatever the steps.
        """
        del planned
        if steps is not None:
            raise UsageError(
                "a pool makes each image once, whatever the steps of its recipe; "
                f"got steps={steps}. Remove steps; it is for generators that learn."
            )
        source = self.fitted(teacher.input_shape).source
        return collect(source, teacher, count, context=context)

    def images_of(self, stream: Iterator[Batch], count: int) -> Tensor:
        """Return the first `count` images [N, *input_shape] of a stream of this pool.

        Bit allocation uses them before tuning does.
        """
        return cast(PoolStream, stream).images(count)

    def stream(
        self,
        teacher: Captured,
        *,
        steps: int,
        context: Context = Context(),
    ) -> "PoolStream":
        """Yield `steps` batches. Errors of the source are raised immediately."""
        pool = self if self.pixels is None else self.fitted(teacher.input_shape)
        needed = -(-pool.images // pool.source.batch)
        made = pool.source.stream(teacher, steps=needed, context=context)
        return PoolStream(pool, made, steps, teacher, context)

    def made(
        self, teacher: Captured, *, context: Context = Context()
    ) -> tuple["ImagePool", Tensor]:
        """Return this pool with its images made, and the images [images, *input_shape].

        For the same seed it streams the same batches as before.
        """
        pool = self.fitted(teacher.input_shape)
        images, labels = collect(pool.source, teacher, pool.images, context=context)
        return replace(pool, source=StoredImages(images, labels, self.source.batch)), images


@dataclass(frozen=True, eq=False)
class StoredImages(Source):
    """Images that were made earlier, in the same order.

    Attributes:
        images: [N, *input_shape].
        labels: [N], if any.
        batch: Images per batch.
    """

    images: Tensor
    labels: Tensor | None
    batch: int

    def stream(
        self,
        teacher: Captured,
        *,
        steps: int,
        context: Context = Context(),
    ) -> Iterator[Batch]:
        """Yield at most `steps` batches; the last may be smaller."""
        batch = Batch((self.images,), self.labels, None)
        yield from islice(batch.split(self.batch), steps)


class PoolStream(Stream):
    """The batches of a pool; the images are made when the first batch is taken."""

    def __init__(
        self,
        pool: ImagePool,
        made: Iterator[Batch],
        steps: int,
        teacher: Captured,
        context: Context,
    ) -> None:
        add = None if pool.candidates is None else partial(_added, pool, teacher, context)
        half = keeps_half(teacher, pool.images_held)
        self._collected = Collected(made, pool.images, teacher.device, add, half=half)
        batches = _Batches(pool, teacher, self._collected, context)
        parts: dict[str, Stateful] = {
            "order": batches.order,
            "images": self._collected,
            "moves": batches.moves,
        }
        super().__init__(batches.make, steps, [batches.draw], parts, again=batches.of)

    @property
    def screening(self) -> Screening | None:
        """What the screen found; None without candidates and before the first batch."""
        return self._collected.screening

    def images(self, count: int) -> Tensor:
        """Return the first `count` images of the pool [N, *input_shape], in the order of making."""
        inputs, _ = self._collected.rows(slice(count))
        if len(inputs) > 1:
            raise UsageError(
                "bits 'auto' is for networks that take images alone; this one has "
                f"{len(inputs)} inputs. Give the bits, as w4a8."
            )
        return inputs[0]


def _added(
    pool: ImagePool, teacher: Captured, context: Context, own: Tensor
) -> tuple[Screening, Tensor, Tensor | None]:
    """Return what a screen found, and the candidates that join a pool's own images."""
    assert pool.candidates is not None
    found = screened(teacher, own, pool.candidates, pool.places, context)
    if found[0].refused:
        warnings.warn(
            f"{found[0]}. The run continues with its own images alone: give other images, or none.",
            GdfqWarning,
            stacklevel=2,
        )
    return found


class _Batches:
    """Draws the batches of a pool.

    Attributes:
        draw: Randomness of the order and of the moves.
        order: Which images come next.
        moves: Whether images are moved, under "them", once it is known.
    """

    def __init__(
        self, pool: ImagePool, teacher: Captured, collected: Collected, context: Context
    ) -> None:
        self._pool, self._teacher, self._context = pool, teacher, context
        self._collected = collected
        self.draw = random_stream(context.seed, "pool.order")
        self.order = Shuffled(self.draw, partial(_whole_batches, pool.batch))
        augmented = pool.augmented and takes_images(teacher.inputs)
        self.moves = Results({} if augmented else {"them": False})

    def make(self, _step: int) -> Batch:
        """Draw a batch."""
        count = self._collected.count()
        if not self.moves:
            self.moves["them"] = self._are_consistent()
        chosen = self.order.next_of(count)
        drawn, labels = self._collected.rows(chosen)
        moves = [vars(random_move(images, self.draw)) for images in drawn if self.moves["them"]]
        return _moved(Batch(drawn, labels, None, origin={"chosen": chosen, "moves": moves}))

    def of(self, origin: Any) -> Batch:
        """Return the batch of an origin: the images that were chosen, and how they are moved."""
        drawn, labels = self._collected.rows(origin["chosen"])
        return _moved(Batch(drawn, labels, None, origin=origin))

    def _are_consistent(self) -> bool:
        """Return whether the teacher predicts the same for images that are moved."""
        # Photographs are more consistent than made images, which come first.
        made = min(self._pool.images, self._collected.count())
        (own,), _ = self._collected.rows(spread(made))
        draw = random_stream(self._context.seed, "pool.moved")
        consistency = prediction_consistency(self._teacher, own, draw)
        # Devices round differently; processes must agree.
        self._context.group.broadcast_([consistency])
        return bool(consistency >= CONSISTENT_SHARE)


def _moved(batch: Batch) -> Batch:
    """Return a batch with its images moved as its origin says."""
    moves = [Move(**values) for values in batch.origin["moves"]]
    if not moves:
        return batch
    return replace(batch, inputs=tuple(map(moved, batch.inputs, moves)))


def _whole_batches(size: int, order: Tensor) -> list[Tensor]:
    """Return the batches of an epoch, the last one first; a smaller one is left out."""
    size = min(size, len(order))
    return [part for part in order.split(size) if len(part) == size][::-1]


def collect(
    source: Source, teacher: Captured, count: int, *, context: Context = Context()
) -> tuple[Tensor, Tensor | None]:
    """Return the first `count` images of a source and their labels.

    Args:
        source: Makes the images.
        teacher: The trained network.
        count: Number of images.
        context: Context of the run.

    Returns:
        Images [count, *input_shape] and labels [count], or None for a teacher whose outputs are not
        classes.
    """
    steps = -(-count // source.batch)
    return first_images(count, source.stream(teacher, steps=steps, context=context))
