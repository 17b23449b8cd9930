"""What a run would cost: time and memory, measured on one step of each stage and multiplied."""

import math
import resource
import sys
import time
from dataclasses import replace
from functools import partial

import torch

from gdfq.analysis.preflight import Diagnosis
from gdfq.execution.budget import MemoryBudget
from gdfq.execution.context import Context
from gdfq.execution.progress import Step
from gdfq.execution.seeding import stream as random_stream
from gdfq.graph.capture import Captured
from gdfq.recipes import Recipe
from gdfq.sources.base import Batch, Source, labels_in_turn
from gdfq.student.build import build_student
from gdfq.student.scheme import Scheme
from gdfq.tuning.calibrate import calibrate_


def with_costs(
    diagnosis: Diagnosis,
    teacher: Captured,
    scheme: Scheme,
    recipe: Recipe,
    memory: MemoryBudget = MemoryBudget(),
) -> Diagnosis:
    """The diagnosis with time and memory, measured on one step of each stage on this device."""
    if diagnosis.problems:
        return diagnosis
    recipe = recipe.fitted(teacher.input_shape)
    if teacher.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(teacher.device)
    seconds = {
        "images": _source_seconds(recipe.source, teacher, recipe.steps, memory),
        "tuning": _tuning_seconds(teacher, scheme, recipe),
    }
    peak = peak_bytes(teacher.device)
    peak += 4 * recipe.source.images_held * math.prod(teacher.input_shape)
    return replace(diagnosis, seconds=seconds, peak_bytes=peak)


def now(device: torch.device) -> float:
    """Seconds of a clock, when a device has done all that it was given."""
    if device.type == "cuda":  # which computes while Python goes on
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_bytes(device: torch.device) -> int:
    """The most memory that was in use: of the GPU for tensors, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    kilo = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilo


class _EnoughError(Exception):
    """Raised by a stopwatch that has seen what it wanted."""


class _Stopwatch:
    """A listener that times the second event and knows how many there would be."""

    def __init__(self, device: torch.device) -> None:
        self.seconds, self.total = 0.0, 0
        self._device = device
        self._last: float | None = None

    def __call__(self, step: Step) -> None:
        at = now(self._device)
        if self._last is not None:
            self.seconds, self.total = at - self._last, step.total
            raise _EnoughError
        self._last = at


def _source_seconds(source: Source, teacher: Captured, steps: int, memory: MemoryBudget) -> float:
    """Of a whole stream: the second iteration, or else the second batch, times their number."""
    source, steps = source.bulk(steps)
    watch = _Stopwatch(teacher.device)
    context = Context(listener=watch, memory=memory)
    stream = source.stream(teacher, steps=max(2, steps), context=context)
    try:
        next(stream)
        started = now(teacher.device)
        next(stream)
    except _EnoughError:
        return watch.seconds * watch.total
    return (now(teacher.device) - started) * steps


def _tuning_seconds(teacher: Captured, scheme: Scheme, recipe: Recipe) -> float:
    """The second update, times their number, on noise."""
    if not recipe.tuning.trains:
        return 0.0
    count = recipe.source.batch
    noise = torch.randn(count, *teacher.input_shape, generator=random_stream(0, "doctor.noise"))
    batch = Batch((noise.to(teacher.device),), labels_in_turn(teacher, 0, count), None)
    student = build_student(teacher, scheme, quantizers=recipe.quantizers)
    calibrate_(student, [batch], steps=1)
    return recipe.tuning.seconds(
        student,
        teacher,
        batch,
        first_step=recipe.warmup,
        total_steps=recipe.steps,
        clock=partial(now, teacher.device),
    )
