"""Seconds of the parts of a run on this machine, each measured on one step before the run."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean
from typing import Any

import torch

from gdfq.analysis.accuracy_drop import drop_work
from gdfq.analysis.images import images_work
from gdfq.analysis.layers import layers_work
from gdfq.effort import MAX_STEPS, Costs
from gdfq.execution.budget import MemoryBudget
from gdfq.execution.context import Context
from gdfq.execution.malloc import release_freed_memory
from gdfq.execution.precision import in_full_float32
from gdfq.execution.progress import Step
from gdfq.execution.replay import calls_before_replay
from gdfq.execution.seeding import stream as random_stream
from gdfq.execution.stopwatch import now
from gdfq.graph.capture import Captured
from gdfq.graph.inputs import takes_images
from gdfq.recipes import EFFORT_RULE, Recipe
from gdfq.sources.base import Batch, labels_in_turn
from gdfq.sources.recent import max_images
from gdfq.student.build import Student, build_student
from gdfq.student.equalization import channel_scales, rescaled
from gdfq.student.freeze import freeze
from gdfq.student.scheme import Scheme
from gdfq.tuning.calibrate import calibrate_
from gdfq.tuning.moment_matching import match_moments_, matched_images

Clock = Callable[[], float]

_EXPORT_CAPTURES, _REPORT_CAPTURES = 1.35, 0.85
"""Seconds of an export, and of writing a report, in those of capturing the network: all three are
work of Python for each operator. Measured on ResNet-20, ResNet-56 and MobileNetV1 x0.25: 1.2 to
1.7, and 0.7 to 0.9."""
_ITERATION_PASSES = 4.0
"""Forward passes that take as long as one iteration of the images, where that is not measured."""
_SAMPLE_IMAGES = 32
"""Images that are enough to time a stage: one of more images takes so many times longer."""
_FEW_IMAGES = 2
"""A pass of so few images shows what a stage takes apart from its images."""
_MEASURED_STEPS = 10_000
"""Steps of the run whose first steps are measured; the number itself does not matter."""


@dataclass(frozen=True)
class Following:
    """What follows a run and belongs to its time.

    Attributes:
        export: Whether an ONNX file is exported.
        report: Whether evidence is measured and a report is written.
        capture_seconds: How long capturing the network took.
    """

    export: bool = False
    report: bool = False
    capture_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        """Seconds of export and report, without the evidence."""
        captures = _EXPORT_CAPTURES * self.export + _REPORT_CAPTURES * self.report
        return captures * self.capture_seconds


def measure_costs(
    teacher: Captured,
    scheme: Scheme,
    recipe: Recipe,
    context: Context = Context(),
    *,
    following: Following = Following(),
    least: float = 0.0,
    clock: Clock | None = None,
) -> Costs:
    """Measure one step of each stage, on noise.

    Nothing is changed: the random streams of the run are not touched, and the student that is
    measured is dropped.

    Args:
        teacher: The captured network.
        scheme: What is quantized.
        recipe: The recipe, fitted to the input, with the source that the run uses.
        context: Precision, memory and processes of the run.
        following: What follows the run.
        least: Further iterations and updates are measured for so many seconds, and their mean is
            taken: the load of a machine changes from step to step.
        clock: Returns the present time in seconds.

    Raises:
        UsageError: The scheme finds nothing to quantize, or the source cannot make images.
    """
    alone = Context(precision=context.precision, memory=context.memory)
    clock = clock or partial(now, teacher.device)
    measurement = _Measurement(teacher, scheme, recipe, alone, least, clock)
    with in_full_float32(teacher.device):
        source = measurement.source()
        student = measurement.student(context.group.size, passes=following.report)
    fixed = source.setup + student.setup + following.seconds
    if following.report:
        fixed += _evidence_seconds(teacher, student, source.per_image, context.memory)
    release_freed_memory()
    made = recipe.source.images_made > 0 and source.per_image is not None
    fewest, most = _steps(recipe)
    return Costs(
        fixed=fixed,
        iteration=(source.per_image or 0.0) / context.group.size if made else None,
        draw=0.0 if made else source.batch / context.group.size,
        calibration=student.calibration,
        matching=student.matching,
        step=student.step,
        batch=recipe.source.batch,
        calibrated=recipe.calibration,
        matched=student.matched,
        warmup=recipe.warmup,
        fewest=fewest,
        steps=most,
    )


def calibration_seconds(
    teacher: Captured,
    scheme: Scheme,
    recipe: Recipe,
    memory: MemoryBudget = MemoryBudget(),
    clock: Clock | None = None,
) -> float:
    """Return the seconds from images to a student that can be tuned, measured on noise.

    They are those of the search for grids, the calibration, and the matching of moments, which fits
    and rounds the weights.

    Args:
        teacher: The captured network, which takes images.
        scheme: What is quantized.
        recipe: The recipe, fitted to the input.
        memory: Budget for the images that pass together.
        clock: Returns the present time in seconds.
    """
    clock = clock or partial(now, teacher.device)
    context = Context(memory=memory)
    measured = _Measurement(teacher, scheme, recipe, context, 0.0, clock).student(updates=False)
    costs = Costs(
        fixed=measured.setup,
        calibration=measured.calibration,
        matching=measured.matching,
        step=0.0 if recipe.tuning.trains else None,
        batch=recipe.source.batch,
        calibrated=recipe.calibration,
        matched=measured.matched,
        warmup=recipe.warmup,
    )
    return costs.seconds(recipe.effort)


def _steps(recipe: Recipe) -> tuple[int, int]:
    """Return the fewest and the most steps that a budget may choose.

    Where images are given and the student is not tuned it chooses nothing: the run calibrates as
    it does without a budget.
    """
    are_given = recipe.source.images_held > 0 and not recipe.source.images_made
    if are_given and not recipe.tuning.trains:
        return recipe.steps, recipe.steps
    return 1, MAX_STEPS


@dataclass(frozen=True)
class _SourceSeconds:
    """Seconds of a source: its setup, an iteration of one image (None without), and a batch."""

    setup: float
    per_image: float | None
    batch: float


@dataclass(frozen=True)
class _StudentSeconds:
    """Seconds of a student: setup and freezing, a batch of each stage, and a pass of one image.

    `matched` is the most batches whose moments are matched, on the average of the layers. `step` is
    None without tuning, and the passes, of teacher and integer network, are 0 where they are not
    asked for.
    """

    setup: float
    calibration: float
    matching: float
    matched: float
    step: float | None
    teacher_pass: float = 0.0
    student_pass: float = 0.0


@dataclass(frozen=True)
class _Measurement:
    """What is measured, with what clock, and for how long at least."""

    teacher: Captured
    scheme: Scheme
    recipe: Recipe
    context: Context
    least: float
    clock: Clock

    def source(self) -> _SourceSeconds:
        """Time an iteration of the source, or a batch of one without any, after the first ones."""
        source, steps = self.recipe.source.bulk(self.recipe.steps)
        times: list[float] = []

        def listener(step: Step) -> None:
            del step
            times.append(self.clock())
            if self._enough(times):
                raise _MeasuredError

        started = self.clock()
        context = replace(self.context, listener=listener)
        stream = source.stream(self.teacher, steps=max(self._before + 1, steps), context=context)
        ends: list[float] = []
        with suppress(_MeasuredError):
            for _ in stream:
                ends.append(self.clock())
                if self._enough(ends):
                    break
        marks = times if len(times) > 1 else ends
        first = max(1, min(self._before, len(marks) - 1))
        each = (marks[-1] - marks[first - 1]) / max(1, len(marks) - first)
        setup = max(0.0, marks[first - 1] - started - first * each)
        if marks is ends:
            return _SourceSeconds(setup, None, each)
        return _SourceSeconds(setup, each / source.batch, each * (source.iterations or 1))

    def _enough(self, times: list[float]) -> bool:
        return len(times) > self._before and times[-1] - times[self._before - 1] >= self.least

    @property
    def _before(self) -> int:
        return calls_before_replay(self.teacher.device)

    def student(
        self, processes: int = 1, *, passes: bool = False, updates: bool = True
    ) -> _StudentSeconds:
        """Time a batch of calibration, of moment matching and of tuning, shared by processes.

        Args:
            processes: How many processes share a batch of tuning.
            passes: Whether to time an image that passes each network.
            updates: Whether to time an update of a student that is tuned.
        """
        teacher, recipe = self.teacher, self.recipe
        batch = _noise(teacher, recipe.source.batch)
        sample, few = (
            tuple(tensor[:count] for tensor in batch.inputs)
            for count in (_SAMPLE_IMAGES, _FEW_IMAGES)
        )
        in_batch = len(batch) / len(sample[0])  # samples
        laps = _Laps(self.clock)
        if recipe.quantizers.equalizes:
            teacher = rescaled(teacher, channel_scales(teacher, self.scheme, *sample))
        student = build_student(
            teacher,
            self.scheme,
            quantizers=recipe.quantizers,
            fixed_statistics=recipe.tuning.fixed_statistics,
        )
        calibrate_(student, [Batch(few, None, None)], steps=1, context=self.context)
        setup = laps.lap()
        calibrate_(student, [Batch(sample, None, None)], steps=1, context=self.context)
        calibration, matching, fits = in_batch * laps.lap(), 0.0, recipe.fit_weights
        if recipe.match_moments:
            match = partial(
                match_moments_, student, teacher, context=self.context, fit_weights=fits
            )
            match(few)
            preparing = laps.lap()
            match(sample)
            setup, matching = setup + preparing, in_batch * max(0.0, laps.lap() - preparing)
        network = freeze(student)
        setup += laps.lap()
        counts = matched_images(teacher.network.graph, EFFORT_RULE.max_images)
        timed = [self.teacher.network, network] if passes else []
        return _StudentSeconds(
            setup,
            calibration,
            matching,
            fmean(counts.values()) / len(batch),
            self._step(student, teacher, batch.split(-(-len(batch) // processes))[0])
            if updates
            else None,
            *(_seconds_of_pass(module, batch, self.clock) for module in timed),
        )

    def _step(self, student: Student, teacher: Captured, batch: Batch) -> float | None:
        """Return the seconds of an update; None without tuning."""
        if not self.recipe.tuning.trains:
            return None
        seconds = self.recipe.tuning.seconds(
            student,
            teacher,
            batch,
            first_step=0,
            total_steps=_MEASURED_STEPS,
            clock=self.clock,
            least=self.least,
            context=self.context,
        )
        return seconds / _MEASURED_STEPS


def _noise(teacher: Captured, count: int) -> Batch:
    draw = random_stream(0, "budget.noise")
    inputs = tuple(spec.noise(count, draw).to(teacher.device) for spec in teacher.inputs)
    layout = [x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x for x in inputs]
    return Batch(tuple(layout), labels_in_turn(teacher, 0, count), None)


@torch.no_grad()
def _seconds_of_pass(network: Callable[..., Any], batch: Batch, clock: Clock) -> float:
    """Return the seconds of one image in a network, in its second pass: the first prepares it."""
    inputs = [tensor[:_SAMPLE_IMAGES] for tensor in batch.inputs]
    network(*inputs)
    started = clock()
    network(*inputs)
    return (clock() - started) / len(inputs[0])


def _evidence_seconds(
    teacher: Captured,
    measured: _StudentSeconds,
    per_image: float | None,
    memory: MemoryBudget,
) -> float:
    """Return the seconds of the evidence for the report; there is little without images."""
    if not takes_images(teacher.inputs):
        return 0.0
    images = max_images([spec.zeros(1) for spec in teacher.inputs])
    work = drop_work(teacher) + images_work(images)
    with suppress(LookupError):  # a weight that is computed from an input: layers have no evidence
        work += layers_work(teacher, memory)
    iteration = _ITERATION_PASSES * measured.teacher_pass if per_image is None else per_image
    return work.seconds(measured.teacher_pass, measured.student_pass, iteration)


class _Laps:
    """The seconds between two calls."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._last = clock()

    def lap(self) -> float:
        last, self._last = self._last, self._clock()
        return self._last - last


class _MeasuredError(Exception):
    """Stops a source after enough iterations were timed."""
