"""Tunings: how a student with known ranges is trained on a stream of batches."""

from abc import abstractmethod
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import repeat
from typing import Protocol, Self

from gdfq.diffusion.weights import MinSnr
from gdfq.execution.context import Context
from gdfq.execution.progress import Step
from gdfq.execution.replay import calls_before_replay
from gdfq.graph.capture import Captured
from gdfq.sources.base import Batch
from gdfq.sources.stream import Feed
from gdfq.student.build import Student


class Tuning(Protocol):
    """Trains a student.

    A tuning is a frozen dataclass that derives from this class and has the method `run_`. The
    properties say what it needs; their defaults suit a tuning that updates the student once for
    each batch.
    """

    @abstractmethod
    def run_(
        self,
        student: Student,
        teacher: Captured,
        feed: Feed,
        *,
        first_step: int,
        total_steps: int,
        batch: int,
        context: Context = Context(),
    ) -> None:
        """Train the student in place, and resume from the state of the registered parts.

        Args:
            student: A student with known activation ranges.
            teacher: The network that it learns from.
            feed: The batches; `feed.taken` of them are already used.
            first_step: Step of the first update, after the warm-up.
            total_steps: Steps of the whole run.
            batch: Images per batch of the feed.
            context: Context of the run; its listener receives each update as a step of "tune".

        Raises:
            GdfqError: The loss is not finite.
        """
        ...

    @property
    def trains(self) -> bool:
        """Whether the student is updated; if not, all steps calibrate."""
        return True

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the parts that `run_` registers with the checkpointer."""
        return ()

    @property
    def holds_batches(self) -> bool:
        """Whether batches that calibrated the student are held for `run_`."""
        return False

    @property
    def learns_labels(self) -> bool:
        """Whether it learns the labels of images beside the teacher's outputs."""
        return False

    @property
    def learns_rounding(self) -> bool:
        """Whether it learns the rounding of weights, which needs quantizers that do."""
        return False

    @property
    def fixed_statistics(self) -> bool:
        """Whether the statistics of batch norms stay as they are."""
        return True

    @property
    def needs_folded_batch_norms(self) -> bool:
        """Whether the student must have its batch norms folded into its layers."""
        return False

    def weighted_by_time(self, weights: MinSnr) -> Self:
        """Return this tuning for a denoiser; the default has no loss that time steps share."""
        del weights
        return self

    def seconds(
        self,
        student: Student,
        teacher: Captured,
        batch: Batch,
        *,
        first_step: int,
        total_steps: int,
        clock: Callable[[], float],
        least: float = 0.0,
        context: Context = Context(),
    ) -> float:
        """Return how long all updates would take: the first that is as long as later ones, times
        their number.

        Args:
            student: A calibrated student; it is trained.
            teacher: The network that it learns from.
            batch: Stands for all batches.
            first_step: Step of the first update.
            total_steps: Steps of the whole run.
            clock: Returns the present time in seconds.
            least: Further updates are measured for so many seconds, and the mean is taken.
            context: Precision and memory of the run.
        """
        times: list[float] = []
        before = calls_before_replay(teacher.device)

        def listener(step: Step) -> None:
            del step
            times.append(clock())
            if len(times) > before and times[-1] - times[before - 1] >= least:
                raise _MeasuredError

        feed = Feed(repeat(batch), teacher.device)
        feed.taken = first_step
        with suppress(_MeasuredError):
            self.run_(
                student,
                teacher,
                feed,
                first_step=first_step,
                total_steps=total_steps,
                batch=len(batch),
                context=Context(
                    listener=listener, precision=context.precision, memory=context.memory
                ),
            )
        times = times[before - 1 :] or times
        measured = max(1, len(times) - 1)
        return (times[-1] - times[0]) / measured * (total_steps - first_step) if times else 0.0


class _MeasuredError(Exception):
    """Stops a tuning after enough updates were timed."""


@dataclass(frozen=True)
class NoTuning(Tuning):
    """No tuning: the student is rounded as it was calibrated."""

    @property
    def trains(self) -> bool:
        """Whether there are updates: none."""
        return False

    def run_(
        self,
        student: Student,
        teacher: Captured,
        feed: Feed,
        *,
        first_step: int,
        total_steps: int,
        batch: int,
        context: Context = Context(),
    ) -> None:
        """Leave the student as it is."""

    def plain_value(self) -> None:
        """Return None, which stands for no tuning in configurations."""


NO_TUNING = NoTuning()
