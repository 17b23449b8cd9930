"""Sources of images: frozen values whose `stream` yields batches for the student."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from gdfq.errors import UsageError
from gdfq.execution.context import Context
from gdfq.execution.distributed import Group
from gdfq.execution.progress import Step
from gdfq.graph.capture import Captured
from gdfq.sources.candidates import Candidates, Screening


@dataclass(frozen=True)
class Batch:
    """The inputs of the student in one step, detached, on the teacher's device.

    Attributes:
        inputs: A tensor [N, *shape] for each input of the network; images are normalised and
            channels_last.
        labels: Integers [N], or None for a network whose outputs are not classes. Of a language
            model: the next token of each but the last, [N, L - 1].
        teacher_logits: [N, C], or None if they were not computed for exactly these images, or if
            the teacher has no classes.
        losses: Scalars for the log.
        origin: What the stream of the batch makes it of again (`Stream.made_again`), as a state
            that is far smaller than the batch; None if it cannot.
    """

    inputs: tuple[Tensor, ...]
    labels: Tensor | None
    teacher_logits: Tensor | None
    losses: Mapping[str, Tensor] = field(default_factory=dict)
    origin: Any = None

    @property
    def images(self) -> Tensor:
        """Images [N, *input_shape] of a network that takes images alone."""
        (images,) = self.inputs
        return images

    def __len__(self) -> int:
        return len(self.inputs[0])

    def shard(self, group: Group) -> "Batch":
        """Return the shard of this process."""

        def rows(x: Tensor | None) -> Tensor | None:
            return None if x is None else group.shard(x)

        inputs = tuple(map(group.shard, self.inputs))
        return Batch(inputs, rows(self.labels), rows(self.teacher_logits), self.losses)

    def split(self, size: int) -> list["Batch"]:
        """Return parts of about equal length, of at most `size` images each."""
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


def next_tokens(tokens: Tensor) -> Tensor:
    """Return the labels [N, L - 1] of sequences [N, L]: what follows each token but the last."""
    return tokens[:, 1:]


def labels_in_turn(teacher: Captured, step: int, batch: int) -> Tensor | None:
    """Return the labels [batch] of a batch when batches cover the classes in turn.

    A batch of fewer images than there are classes takes evenly spaced classes, because neighbouring
    classes are often similar, such as the dog breeds of ImageNet.

    Args:
        teacher: The network that has the classes.
        step: Number of the batch, from 0.
        batch: Images per batch.

    Returns:
        Integers on the teacher's device, or None for a teacher whose outputs are not classes.
    """
    classes = teacher.classes
    if classes is None:
        return None
    apart = -(-classes // batch)
    order = torch.cat([torch.arange(first, classes, apart) for first in range(apart)])
    return order[(torch.arange(batch) + step * batch) % classes].to(teacher.device)


def first_images(count: int, made: Iterable[Batch]) -> tuple[Tensor, Tensor | None]:
    """Return the first `count` images of some batches, and their labels if they have any."""
    (images,), labels = first_inputs(count, made)
    return images, labels


def first_inputs(count: int, made: Iterable[Batch]) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """Return the first `count` inputs of some batches, and their labels if they have any.

    Args:
        count: Maximum number of entries.
        made: Batches of one network.

    Returns:
        A tensor [count, *shape] for each input of the network, and labels [count].
    """
    batches = list(made)
    inputs = tuple(tensor[:count] for tensor in joined_inputs(batches))
    labels = [batch.labels for batch in batches if batch.labels is not None]
    return inputs, torch.cat(labels)[:count] if labels else None


def split_inputs(inputs: Sequence[Tensor], size: int) -> list[tuple[Tensor, ...]]:
    """Return parts of at most `size` entries each, in order."""
    return list(zip(*(tensor.split(size) for tensor in inputs), strict=True))


def joined_inputs(batches: Iterable[Batch]) -> tuple[Tensor, ...]:
    """Return the inputs of some batches as one batch."""
    return tuple(map(torch.cat, zip(*(batch.inputs for batch in batches), strict=True)))


class Source(Protocol):
    """Supplies a student with images: generated, optimised or given, all interchangeable.

    A source is a frozen dataclass that derives from this class. It has the field `batch` and the
    method `stream`; the other methods have defaults that suit a source of independent batches.

    Attributes:
        batch: Images per batch.
    """

    batch: int

    @abstractmethod
    def stream(
        self,
        teacher: Captured,
        *,
        steps: int,
        context: Context = Context(),
    ) -> Iterator[Batch]:
        """Yield `steps` batches.

        The same seed gives the same batches. All processes of a group call this with the same
        arguments and get the same whole batches, which they may make together.

        Args:
            teacher: The trained network.
            steps: Total number of batches.
            context: Its listener receives the steps of the work that precedes a batch.
        """
        ...

    @property
    def most_at_once(self) -> int:
        """Images of the largest batch that passes through a network with gradients."""
        return self.batch

    @property
    def images_held(self) -> int:
        """Images that stay in memory for the whole run."""
        return 0

    @property
    def images_made(self) -> int:
        """Images that it makes before the student learns; 0 if they come while it learns."""
        return 0

    @property
    def iterations(self) -> int | None:
        """Updates of each image; None for a source that does not optimise its images."""
        return None

    @property
    def makes_text(self) -> bool:
        """Whether it makes text, for language models alone."""
        return False

    def seconds_before(self, teacher: Captured, clock: Callable[[], float]) -> float | None:
        """Return how long all work before the first batch takes; None if batches share it evenly.

        Args:
            teacher: The network that makes the data.
            clock: Returns the present time in seconds.
        """
        del teacher, clock
        return None

    @property
    def within_limits(self) -> bool:
        """Whether its images only have values that pixels have, where their range is known."""
        return False

    def with_batch(self, batch: int) -> Self:
        """Return this source with `batch` images per batch."""
        return replace(self, batch=batch)  # type: ignore[type-var]

    def with_images(self, images: int, *, once: bool = False) -> Self:
        """Return this source with `images` images, which it makes before the student learns.

        Args:
            images: Number of images.
            once: Whether all batches of an epoch get one size: hardly any image is left out.

        Raises:
            UsageError: Its images come while the student learns.
        """
        del once
        raise UsageError(
            "a number of images is for recipes with a pool of synthetic images, such as fast; this "
            "recipe gets one batch of images in each of its steps. Give steps and batch instead of "
            f"images; got {images}."
        )

    def with_iterations(self, iterations: int) -> Self:
        """Return this source with `iterations` updates of each image.

        Raises:
            UsageError: It does not optimise its images.
        """
        if self.iterations is None:
            raise UsageError(
                "iterations are for images that are optimised, as by recipe fast; those of this "
                f"recipe are not. Remove iterations; got {iterations}."
            )
        return replace(self, iterations=iterations)  # type: ignore[type-var]

    def fitted(self, input_shape: Sequence[int]) -> Self:
        """Return this source at a size that suits inputs of shape [C, *size]."""
        del input_shape
        return self

    def on(self, given: "Source", count: int) -> "Source":
        """Return a source of given images instead of those that this one would make.

        Args:
            given: A source of given images.
            count: How many images there are.
        """
        del count
        return given.with_batch(self.batch)

    def with_candidates(self, candidates: Candidates, places: int) -> "Source":
        """Return this source with images from elsewhere among its own.

        Args:
            candidates: Images, of which a screen keeps some.
            places: Maximum number of images that are kept.

        Raises:
            UsageError: It makes its images while the student learns.
        """
        del places
        raise UsageError(
            f"{candidates.kind} images join a pool of images, such as that of recipe fast; the "
            "images of this recipe come while the student learns. Use fast or quick."
        )

    def screening_of(self, stream: Iterator[Batch]) -> Screening | None:
        """Return what a screen found for a stream of this source; None without a screen."""
        del stream
        return None

    def bulk(self, steps: int) -> tuple["Source", int]:
        """Return the source whose batches take the time of a run, and how many of them it makes.

        Args:
            steps: Batches that the run takes from this source.
        """
        return self, steps

    def make_images(
        self,
        teacher: Captured,
        count: int,
        *,
        steps: int | None,
        planned: int,
        context: Context = Context(),
    ) -> tuple[Tensor, Tensor | None]:
        """Return `count` images alone [count, *input_shape] and their labels [count], if any.

        They are the last ones of the stream, because a source that learns is best at its end.

        Args:
            teacher: The trained network.
            count: Number of images.
            steps: Batches of the stream, if the user chose a number.
            planned: Batches of the recipe's run, which count otherwise.
            context: Context of the run.

        Raises:
            UsageError: The source does not learn on the way, and `steps` was given.
        """
        needed = -(-count // self.batch)
        total = max(planned if steps is None else steps, needed)
        last: list[Batch] = []
        for step, batch in enumerate(self.stream(teacher, steps=total, context=context), start=1):
            context.listener(Step("generate", step, total, batch.losses))
            if step > total - needed:
                last.append(batch)
        return first_images(count, last)

    def images_of(self, stream: Iterator[Batch], count: int) -> Tensor:
        """Return the first `count` images of a stream of this source at most, before it is read.

        Raises:
            UsageError: The images come while the student learns.
        """
        del stream, count
        raise UsageError(
            "bits 'auto' needs images before the student learns, and so a recipe with a pool of "
            "them; this recipe's images come while it learns. Use fast or quick."
        )
