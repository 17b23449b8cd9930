"""Seconds of the parts of a run on this machine, each measured on one step before the run."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from gdfq.analysis.accuracy_drop import drop_work
from gdfq.analysis.cost import now
from gdfq.analysis.images import images_work
from gdfq.analysis.layers import layers_work
from gdfq.effort import Costs
from gdfq.execution.budget import MemoryBudget
from gdfq.execution.context import Context
from gdfq.execution.malloc import release_freed_memory
from gdfq.execution.progress import Step
from gdfq.execution.seeding import stream as random_stream
from gdfq.graph.capture import Captured
from gdfq.graph.inputs import takes_images
from gdfq.recipes import Recipe
from gdfq.sources.base import Batch, Source, labels_in_turn
from gdfq.sources.recent import max_images
from gdfq.student.build import build_student
from gdfq.student.equalization import channel_scales, rescaled
from gdfq.student.freeze import freeze
from gdfq.student.scheme import Scheme
from gdfq.tuning.calibrate import calibrate_
from gdfq.tuning.moment_matching import match_moments_, matched_images

Clock = Callable[[], float]

_EXPORT_CAPTURES, _REPORT_CAPTURES = 1.5, 1.2
"""Seconds of an export, and of writing a report, in those of capturing the network: all three are
work of Python for each operator. Measured on ResNet-20, ResNet-56 and MobileNetV1 x0.25: 1.2 to
1.7, and 0.7 to 1.5."""
_ITERATION_PASSES = 4.0
"""Forward passes that take as long as one iteration of the images, where that is not measured."""
_EQUALIZED_IMAGES = 32
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


@dataclass(frozen=True)
class _SourceCosts:
    """Seconds of a source: its setup, an iteration of a batch (None without), a batch."""

    setup: float
    iteration: float | None
    batch: float


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
    clock = clock or partial(now, teacher.device)
    processes = context.group.size
    context = Context(precision=context.precision, memory=context.memory)
    source = _source_costs(recipe.source, teacher, recipe.steps, context, least, clock)
    made = recipe.effort.images is not None
    per_image = None
    if source.iteration is not None:
        per_image = source.iteration / recipe.source.bulk(recipe.steps)[0].batch
    costs = _student_costs(
        teacher, scheme, recipe, context, processes, per_image, following, least, clock
    )
    release_freed_memory()
    return replace(
        costs,
        fixed=costs.fixed + source.setup,
        iteration=per_image / processes if made and per_image is not None else None,
        draw=0.0 if made else source.batch / processes,
        steps=_most_steps(recipe, costs.steps),
    )


def _most_steps(recipe: Recipe, otherwise: int) -> int:
    """Return how many batches a pool calibrates on without tuning: each image once."""
    held = recipe.source.images_held
    if recipe.tuning.trains or not held:
        return otherwise
    return max(1, held // recipe.source.batch)


def _source_costs(
    source: Source,
    teacher: Captured,
    steps: int,
    context: Context,
    least: float,
    clock: Clock,
) -> _SourceCosts:
    """Time the second iteration of a source, or the second batch of one without iterations."""
    source, steps = source.bulk(steps)
    times: list[float] = []

    def listener(step: Step) -> None:
        del step
        times.append(clock())
        if len(times) > 1 and times[-1] - times[0] >= least:
            raise _MeasuredError

    started = clock()
    ends: list[float] = []
    stream = source.stream(
        teacher, steps=max(2, steps), context=replace(context, listener=listener)
    )
    with suppress(_MeasuredError):
        for _ in stream:
            ends.append(clock())
            if len(ends) > 1 and ends[-1] - ends[0] >= least:
                break
    marks = times if len(times) > 1 else ends
    each = (marks[-1] - marks[0]) / max(1, len(marks) - 1)
    setup = max(0.0, marks[0] - started - each)
    if len(times) < 2:
        return _SourceCosts(setup, None, each)
    return _SourceCosts(setup, each, each * (source.iterations or 1))


def _student_costs(
    teacher: Captured,
    scheme: Scheme,
    recipe: Recipe,
    context: Context,
    processes: int,
    per_image: float | None,
    following: Following,
    least: float,
    clock: Clock,
) -> Costs:
    """Time calibration, moment matching, an update, and what follows the run."""
    family, tuning, count = recipe.quantizers, recipe.tuning, recipe.source.batch
    batch = _noise(teacher, count)
    few = tuple(tensor[:_FEW_IMAGES] for tensor in batch.inputs)
    laps = _Laps(clock)
    prepared = teacher
    if family.equalizes:
        sample = [tensor[:_EQUALIZED_IMAGES] for tensor in batch.inputs]
        prepared = rescaled(teacher, channel_scales(teacher, scheme, *sample))
    student = build_student(
        prepared, scheme, quantizers=family, fixed_statistics=tuning.fixed_statistics
    )
    calibrate_(student, [replace(batch, inputs=few)], steps=1, context=context)
    setup = laps.lap()
    calibrate_(student, [batch], steps=1, context=context)
    calibration, matching = laps.lap(), 0.0
    if recipe.match_moments:
        match_moments_(student, prepared, few, context.memory)
        preparing = laps.lap()
        match_moments_(student, prepared, batch.inputs, context.memory)
        setup, matching = setup + preparing, max(0.0, laps.lap() - preparing)
    network = freeze(student)
    setup += laps.lap()
    after = following.capture_seconds * (
        _EXPORT_CAPTURES * following.export + _REPORT_CAPTURES * following.report
    )
    if following.report:
        after += _evidence_seconds(
            teacher,
            _seconds_of_pass(teacher.network, batch, clock),
            _seconds_of_pass(network, batch, clock),
            per_image,
            context.memory,
        )
    step = None
    if tuning.trains:
        shard = batch.split(-(-count // processes))[0]
        seconds = tuning.seconds(
            student,
            prepared,
            shard,
            first_step=0,
            total_steps=_MEASURED_STEPS,
            clock=clock,
            least=least,
            context=context,
        )
        step = seconds / _MEASURED_STEPS
    return Costs(
        fixed=setup + after,
        calibration=calibration,
        matching=matching,
        step=step,
        batch=count,
        calibrated=recipe.calibration,
        matched=matched_images(batch.inputs) / count,
        warmup=recipe.warmup,
    )


def _noise(teacher: Captured, count: int) -> Batch:
    draw = random_stream(0, "budget.noise")
    inputs = tuple(spec.noise(count, draw).to(teacher.device) for spec in teacher.inputs)
    layout = [x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x for x in inputs]
    return Batch(tuple(layout), labels_in_turn(teacher, 0, count), None)


@torch.no_grad()
def _seconds_of_pass(network: Callable[..., Any], batch: Batch, clock: Clock) -> float:
    """Return the seconds of one image in a network, in its second pass: the first prepares it."""
    inputs = [tensor[:_EQUALIZED_IMAGES] for tensor in batch.inputs]
    network(*inputs)
    started = clock()
    network(*inputs)
    return (clock() - started) / len(inputs[0])


def _evidence_seconds(
    teacher: Captured,
    teacher_pass: float,
    student_pass: float,
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
    iteration = _ITERATION_PASSES * teacher_pass if per_image is None else per_image
    return work.seconds(teacher_pass, student_pass, iteration)


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
