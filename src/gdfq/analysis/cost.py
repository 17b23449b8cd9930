"""Time and memory of a run, estimated from one measured step of each stage."""

import math
from dataclasses import replace
from functools import partial

import torch

from gdfq.analysis.preflight import Diagnosis
from gdfq.analysis.run_costs import calibration_seconds
from gdfq.execution.budget import MemoryBudget
from gdfq.execution.context import Context
from gdfq.execution.precision import in_full_float32
from gdfq.execution.progress import Step
from gdfq.execution.replay import calls_before_replay
from gdfq.execution.seeding import stream as random_stream
from gdfq.execution.stopwatch import now, peak_bytes
from gdfq.graph.capture import Captured
from gdfq.graph.inputs import takes_images
from gdfq.recipes import Recipe
from gdfq.sources.base import Batch, Source, labels_in_turn, next_tokens
from gdfq.sources.collected import keeps_half
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
    """Add time and memory to a diagnosis, measured on one step of each stage on this device.

    A diagnosis with problems is returned as it is.

    Args:
        diagnosis: The result of `gdfq.analysis.preflight.diagnose` for the other arguments.
        teacher: The trained network.
        scheme: What is quantized, and to how many bits.
        recipe: The recipe, fitted to the input of the network.
        memory: Budget for the images that pass together.
    """
    if diagnosis.problems:
        return diagnosis
    if teacher.vocabulary is None:
        recipe = recipe.fitted(teacher.inputs[0].shape)
    if teacher.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(teacher.device)
    made = "text" if recipe.source.makes_text else "images"
    with in_full_float32(teacher.device):
        seconds = {made: _source_seconds(recipe.source, teacher, recipe.steps, memory)}
        if takes_images(teacher.inputs):
            seconds["calibration"] = calibration_seconds(teacher, scheme, recipe, memory)
        seconds["tuning"] = _tuning_seconds(teacher, scheme, recipe)
    peak = peak_bytes(teacher.device)
    if peak is not None:
        values = sum(math.prod(spec.shape) for spec in teacher.inputs)
        held = recipe.source.images_held
        peak += (2 if keeps_half(teacher, held) else 4) * held * values
    return replace(diagnosis, seconds=seconds, peak_bytes=peak)


class _StopError(Exception):
    """Raised by a stopwatch to end the stage after the measured step."""


class _StepTimer:
    """A listener that times the first step that is as long as later ones.

    It notes the total number of steps.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds, self.total = 0.0, 0
        self._device, self._last, self._seen = device, 0.0, 0

    def __call__(self, step: Step) -> None:
        at = now(self._device)
        self.seconds, self.total = at - self._last, step.total
        if self._seen >= calls_before_replay(self._device):
            raise _StopError
        self._last, self._seen = at, self._seen + 1


def _source_seconds(source: Source, teacher: Captured, steps: int, memory: MemoryBudget) -> float:
    """Seconds of a stream: those of an iteration, or else batch, times their number.

    The first ones are left out, which take longer.
    Text, each of whose tokens takes longer than the one before, says it itself.
    """
    written = source.seconds_before(teacher, partial(now, teacher.device))
    if written is not None:
        return written
    source, steps = source.bulk(steps)
    watch = _StepTimer(teacher.device)
    context = Context(listener=watch, memory=memory)
    before = calls_before_replay(teacher.device)
    stream = source.stream(teacher, steps=max(before + 1, steps), context=context)
    try:
        for _ in range(before):
            next(stream)
        started = now(teacher.device)
        next(stream)
    except _StopError:
        return watch.seconds * watch.total
    return (now(teacher.device) - started) * steps


def _tuning_seconds(teacher: Captured, scheme: Scheme, recipe: Recipe) -> float:
    """Seconds of tuning: those of an update after the first, on noise, times their number."""
    if not recipe.tuning.trains:
        return 0.0
    count = recipe.source.batch
    draw = random_stream(0, "doctor.noise")
    noise = tuple(spec.noise(count, draw).to(teacher.device) for spec in teacher.inputs)
    is_text = teacher.vocabulary is not None
    labels = next_tokens(noise[0]) if is_text else labels_in_turn(teacher, 0, count)
    batch = Batch(noise, labels, None)
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
