"""The images of a pool, which are made once, and which a resumed run takes from its checkpoint."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from gdfq.errors import UsageError
from gdfq.execution.malloc import release_freed_memory
from gdfq.files.states import Frozen, digest_of
from gdfq.graph.capture import Captured
from gdfq.sources.base import Batch, first_images
from gdfq.sources.candidates import Screening
from gdfq.sources.stream import restored_batch, stored_batch

_HALF_BYTES = 2**28
"""Bytes of images in single precision above which half precision keeps them."""

Add = Callable[[Tensor], tuple[Screening, Tensor, Tensor | None]]
"""Images of a pool -> what a screen found, and the images that it adds, with their labels."""


class Collected:
    """The first `count` images of a stream, those that are added to them, and all their labels.

    They are made once. Each batch is a part of the state that is written when it is finished.

    Args:
        made: The stream.
        count: Images that are taken from it.
        device: Where they stay.
        add: Adds images.
        half: Whether images are kept in half precision.
    """

    def __init__(
        self,
        made: Iterator[Batch],
        count: int,
        device: torch.device,
        add: Add | None = None,
        *,
        half: bool = False,
    ) -> None:
        self._made, self._count, self._device, self._add = made, count, device, add
        self._half = half
        self._parts: list[Frozen] = []
        self._added: Frozen | None = None
        self.screening: Screening | None = None
        self._all: tuple[tuple[Tensor, ...], Tensor | None] | None = None
        self._digests: list[str] | None = None

    def count(self) -> int:
        """Return how many images there are; they are made if they are not."""
        return len(self._whole()[0][0])

    def rows(self, chosen: Tensor | slice) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """Return the chosen images, a tensor for each input of the network, and their labels."""
        inputs, labels = self._whole()
        return (
            tuple(_in_full(tensor[chosen]) for tensor in inputs),
            None if labels is None else labels[chosen],
        )

    def _whole(self) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """Return all images as they are kept, and their labels; they are made if they are not."""
        if self._all is None:
            self._take()
            if self._add is not None and self._added is None:
                own, _ = first_images(self._count, [Batch(**part.value) for part in self._parts])
                self.screening, images, labels = self._add(_in_full(own))
                self._added = self._kept(Frozen(vars(Batch((images,), labels, None))))
            self._all = self._joined()
            release_freed_memory()
        return self._all

    def _kept(self, part: Frozen) -> Frozen:
        """Return the values of a batch as they are kept."""
        inputs = part.value["inputs"]
        if not self._half or all(tensor.dtype == torch.float16 for tensor in inputs):
            return part
        return Frozen({**part.value, "inputs": tuple(tensor.half() for tensor in inputs)})

    def _take(self) -> None:
        """Take the batches that are missing from the stream."""
        taken = sum(len(part.value["inputs"][0]) for part in self._parts)
        while taken < self._count and (batch := next(self._made, None)) is not None:
            part = Frozen(vars(replace(batch, teacher_logits=None, losses={})))
            self._parts.append(self._kept(part))
            taken += len(batch)

    def _joined(self) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """Return all images and labels. The parts become views of them, not to be held twice."""
        parts = self._parts if self._added is None else [*self._parts, self._added]
        inputs = _moved_together_(parts)
        batches = [Batch(**part.value) for part in parts]
        made = sum(map(len, batches[: len(self._parts)]))

        def used(tensor: Tensor) -> Tensor:
            """Return the first images that were made, and all that were added."""
            if self._added is None or made <= self._count:
                return tensor if self._added is not None else tensor[: self._count]
            return torch.cat([tensor[: self._count], tensor[made:]])

        labels = [batch.labels for batch in batches if batch.labels is not None]
        return tuple(map(used, inputs)), used(torch.cat(labels)) if labels else None

    def state_dict(self) -> dict[str, Any]:
        stream = self._made.state_dict() if hasattr(self._made, "state_dict") else None
        parts = [stored_batch(part, stays=True) for part in self._parts]
        return {
            "parts": parts,
            "digests": self._digests_of_all(),
            "stream": stream,
            "added": self._added,
            "screening": None if self.screening is None else dict(vars(self.screening)),
        }

    def _digests_of_all(self) -> list[str] | None:
        """Return hashes of all inputs, once they are there and unless they are stored."""
        if self._all is None:
            return None
        if self._digests is None:
            read = any(part.value["origin"] is not None for part in self._parts)
            self._digests = list(map(digest_of, self._all[0])) if read else []
        return self._digests

    def load_state_dict(self, state: dict[str, Any]) -> None:
        parts = state["parts"]
        if hasattr(self._made, "load_state_dict"):
            self._made.load_state_dict(state["stream"])
        elif state["digests"] is None:  # it makes its batches again
            next(islice(self._made, len(parts), len(parts)), None)
        restored = (restored_batch(part, self._made, self._device) for part in parts)
        self._parts = list(map(self._kept, restored))
        if state["screening"] is not None:
            self._added = self._kept(state["added"].to(self._device))
            self.screening = Screening(**state["screening"])
        if state["digests"] is not None:
            self._all = self._joined()
            if self._digests_of_all() != state["digests"]:
                raise ValueError("the given images are not those that the run started with")


def keeps_half(teacher: Captured, count: int) -> bool:
    """Return whether a pool of `count` images keeps half precision: large ones of pixels do.

    Half precision changes a pixel by at most an eighth of the step 1/255 between two values of 8
    bits. Images of unknown limits keep single precision.
    """
    if teacher.input_limits is None:
        return False
    return 4 * count * math.prod(teacher.input_shape) > _HALF_BYTES


def _in_full(images: Tensor) -> Tensor:
    """Return images in single precision."""
    return images.float() if images.dtype == torch.float16 else images


def _moved_together_(parts: Sequence[Frozen]) -> tuple[Tensor, ...]:
    """Return the inputs of batches as one tensor each; the batches become views of them.

    On a CPU each batch is freed when it is copied, so that little more is held than one of the two.

    Raises:
        UsageError: The batches have inputs of different shapes or dtypes.
    """
    counts = [len(part.value["inputs"][0]) for part in parts]
    wholes = [_uninitialised(sum(counts), first) for first in parts[0].value["inputs"]]
    views = zip(*(whole.split(counts) for whole in wholes), strict=True)
    for part, own in zip(parts, views, strict=True):
        for view, tensor in zip(own, part.value["inputs"], strict=True):
            if (tensor.shape, tensor.dtype) != (view.shape, view.dtype):
                raise UsageError(
                    "all batches of a source must have inputs of one shape and dtype; there are "
                    f"{list(view.shape[1:])} in {view.dtype} and {list(tensor.shape[1:])} in "
                    f"{tensor.dtype}."
                )
            view.copy_(tensor)
            del tensor
        part.value = {**part.value, "inputs": own}
        release_freed_memory()
    return tuple(wholes)


def _uninitialised(count: int, like: Tensor) -> Tensor:
    """Return an uninitialised tensor of so many rows in the layout that `torch.cat` gives them."""
    joined = torch.cat([like[:1], like[:1]])
    layout = torch.contiguous_format if joined.is_contiguous() else torch.channels_last
    shape = (count, *like.shape[1:])
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)
