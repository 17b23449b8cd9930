"""Streams of batches that resume after an interruption with bit-identical results."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from gdfq.execution.distributed import Group
from gdfq.execution.progress import Listener, Step, silent
from gdfq.files.states import Frozen, Stateful
from gdfq.sources.base import Batch
from gdfq.sources.recent import Recent

Start = TypeVar("Start")


class Stream:
    """A stream of batches that a function makes.

    If an interruption leaves a batch unfinished, a resumed run makes it again.

    Args:
        make: Returns the batch of a step, from 0 on.
        steps: Number of batches to yield.
        draws: All randomness of the batches.
        parts: Other state that batches depend on and change, by name.
        again: Makes a batch of its `Batch.origin`, where batches have one.
        ahead: Number of batches that are made first and not yielded.
        listener: Receives these batches as steps of the stage "generator".
    """

    def __init__(
        self,
        make: Callable[[int], Batch],
        steps: int,
        draws: Sequence[torch.Generator],
        parts: Mapping[str, Stateful] | None = None,
        *,
        again: Callable[[Any], Batch] | None = None,
        ahead: int = 0,
        listener: Listener = silent,
    ) -> None:
        self._make, self._end, self._draws, self._parts = make, ahead + steps, draws, parts or {}
        self._again, self._ahead, self._listener = again, ahead, listener
        self._step = 0
        self._note_random_states()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        while self._step < self._end:
            batch = self._make(self._step)
            self._step += 1
            self._note_random_states()
            if self._step > self._ahead:
                return batch
            self._listener(Step("generator", self._step, self._ahead, batch.losses))
        raise StopIteration

    def made_again(self, origin: Any) -> Batch:
        """Return the batch of an origin, the same to the bit; the stream stays where it is.

        Args:
            origin: `Batch.origin` of one of its batches.
        """
        assert self._again is not None, "the batches of this stream have no origin"
        return self._again(origin)

    def _note_random_states(self) -> None:
        self._states = [draw.get_state() for draw in self._draws]

    def state_dict(self) -> dict[str, Any]:
        parts = {name: part.state_dict() for name, part in self._parts.items()}
        return {"step": self._step, "draws": self._states, "parts": parts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._step = state["step"]
        for draw, value in zip(self._draws, state["draws"], strict=True):
            draw.set_state(value)
        self._note_random_states()
        for name, part in self._parts.items():
            part.load_state_dict(state["parts"][name])


class Shuffled:
    """The indices of images, in a new random order for each epoch, one batch at a time.

    Args:
        draw: Randomness of the orders.
        split: Splits an order into batches.
    """

    def __init__(self, draw: torch.Generator, split: Callable[[Tensor], list[Tensor]]) -> None:
        self._draw, self._split = draw, split
        self._pending: list[Tensor] = []

    def next_of(self, count: int) -> Tensor:
        """Return the next batch of the indices 0..count − 1."""
        if not self._pending:
            self._pending = self._split(torch.randperm(count, generator=self._draw))
        return self._pending.pop(0)

    def state_dict(self) -> dict[str, Any]:
        return {"pending": self._pending}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._pending = list(state["pending"])


class InTurn(Generic[Start]):
    """Images of independent batches: in each round every process makes the images of one batch.

    Args:
        draw: Returns the start of a batch. Every process draws the starts of all processes.
        make: Returns the images of a batch, given its step and its start.
        steps: Total number of batches.
        group: The processes.
        device: Where the images are; those of a state that was read from a file are moved there.
    """

    def __init__(
        self,
        draw: Callable[[], Start],
        make: Callable[[int, Start], Tensor],
        steps: int,
        group: Group,
        device: torch.device,
    ) -> None:
        self._draw, self._make, self._steps, self._group = draw, make, steps, group
        self._device = device
        self._ready: list[Tensor] = []

    def __call__(self, step: int) -> Tensor:
        """Return the images of a step; steps come in order."""
        if not self._ready:
            starts = [self._draw() for _ in range(min(self._group.size, self._steps - step))]
            own = min(self._group.rank, len(starts) - 1)  # extra processes repeat the last batch
            images = self._make(step + own, starts[own])
            self._ready = [self._group.broadcast(rank, images) for rank in range(len(starts))]
        return self._ready.pop(0)

    def state_dict(self) -> dict[str, Any]:
        return {"ready": self._ready}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._ready = [images.to(self._device) for images in state["ready"]]


def stored_batch(part: Frozen, *, stays: bool) -> Any:
    """Return the state of a batch: its origin, if it has one, or else all of it.

    Args:
        part: The attributes of the batch.
        stays: Whether later states have this batch, too.
    """
    origin = part.value["origin"]
    if origin is not None:
        return {"origin": origin}
    return part if stays else {"batch": part.value}


def restored_batch(state: Any, stream: Iterator[Batch], device: torch.device) -> Frozen:
    """Return the part whose state `stored_batch` returned.

    Args:
        state: The state.
        stream: The stream of the batch, with its state restored.
        device: Where the batch was.
    """
    if isinstance(state, Frozen):
        return state.to(device)
    if "batch" in state:
        return Frozen(state["batch"]).to(device)
    assert isinstance(stream, Stream), "only a Stream makes batches with an origin"
    return Frozen(vars(stream.made_again(state["origin"])))


class Feed:
    """A stream whose batches the stages of a run take, with the state that a resumed run needs.

    A stream without a state resumes by making its batches again.

    Attributes:
        stream: The batches.
        taken: Number of batches that were taken.
        recent: The last images that were taken.
    """

    _EXAMPLES = 32

    def __init__(self, stream: Iterator[Batch], device: torch.device) -> None:
        self.stream, self._device = stream, device
        self.taken = 0
        self._examples: Frozen | None = None
        self._origin: Any = None  # of the batch of the examples
        self._first: Frozen | None = None
        self._held: list[Frozen] = []
        self.recent = Recent()

    @property
    def examples(self) -> tuple[Tensor, ...]:
        """A few inputs of the first batch, [n, *shape] each; `begin` was called before."""
        assert self._examples is not None, "no batch was taken yet"
        examples: tuple[Tensor, ...] = self._examples.value
        return examples

    @property
    def held(self) -> list[Batch]:
        """The batches that were held."""
        return [Batch(**part.value) for part in self._held]

    def begin(self) -> None:
        """Make the first batch, which is yielded later, to have examples."""
        if self._examples is None and (batch := next(self.stream, None)) is not None:
            self._first = Frozen(vars(batch))
            self._take_examples(batch)

    def _take_examples(self, batch: Batch) -> None:
        self._examples = Frozen(tuple(x[: self._EXAMPLES].clone() for x in batch.inputs))
        self._origin = batch.origin

    def until(self, count: int, *, hold: bool = False) -> Iterator[Batch]:
        """Yield the batches up to the `count`-th of all.

        Args:
            count: Number of batches, those included that were taken before.
            hold: Whether these batches stay in memory.
        """
        while self.taken < count:
            self.begin()
            part, self._first = self._first, None
            if part is None:
                if (batch := next(self.stream, None)) is None:
                    return
                part = Frozen(vars(batch))
            if hold:
                self._held.append(part)
            self.taken += 1
            self.recent.see_(part)
            yield Batch(**part.value)

    def hold(self, count: int) -> list[Batch]:
        """Return the first `count` held batches; more batches are taken as needed."""
        for _ in self.until(self.taken + count - len(self._held), hold=True):
            pass
        return self.held[:count]

    def state_dict(self) -> dict[str, Any]:
        of_stream = self.stream.state_dict() if hasattr(self.stream, "state_dict") else None
        first = [] if self._first is None else [self._first]
        stay = {*first, *self._held}
        parts = list(dict.fromkeys([*first, *self._held, *self.recent.parts]))
        place = {part: index for index, part in enumerate(parts)}
        return {
            "taken": self.taken,
            "examples": self._examples if self._origin is None else {"origin": self._origin},
            "batches": [stored_batch(part, stays=part in stay) for part in parts],
            "first": bool(first),
            "held": [place[part] for part in self._held],
            "recent": [place[part] for part in self.recent.parts],
            "stream": of_stream,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taken = state["taken"]
        if hasattr(self.stream, "load_state_dict"):
            self.stream.load_state_dict(state["stream"])
        else:
            seen = self.taken + state["first"]
            next(islice(self.stream, seen, seen), None)
        parts = [restored_batch(part, self.stream, self._device) for part in state["batches"]]
        self._first = parts[0] if state["first"] else None
        self._held = [parts[index] for index in state["held"]]
        self.recent.parts = deque(parts[index] for index in state["recent"])
        if (examples := state["examples"]) is None or isinstance(examples, Frozen):
            self._examples = examples and examples.to(self._device)
        else:
            part = restored_batch(examples, self.stream, self._device)
            self._take_examples(Batch(**part.value))
