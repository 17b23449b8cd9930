"""The stages of a run, in order. Each one resumes where it stopped.

A stage that is over leaves a mark among the registered parts of the run; a resumed run skips it.
"""

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch

from gdfq.analysis.accuracy import output_similarities
from gdfq.analysis.bit_allocation import ALLOCATION_IMAGES, choose_bits, onnx_sizes
from gdfq.analysis.language import language_measures
from gdfq.analysis.observations import TestPredictions
from gdfq.analysis.own_text import as_metrics, held_out_measures
from gdfq.analysis.samples import SampleComparison, compare_samples
from gdfq.data.tensors import network_inputs, summary_of
from gdfq.deploy.metadata import metadata_of
from gdfq.equalizers.base import check_equal
from gdfq.errors import GdfqWarning
from gdfq.execution.context import Context
from gdfq.execution.guards import batch_that_fits_suggested
from gdfq.execution.malloc import release_freed_memory
from gdfq.execution.progress import Step
from gdfq.execution.seeding import stream as random_stream
from gdfq.execution.stopwatch import Stopwatch
from gdfq.files.plain_values import frozen_values
from gdfq.files.states import Results, name_of
from gdfq.functional.grid import UNROUNDED
from gdfq.graph.capture import Captured
from gdfq.graph.ends import body_names
from gdfq.graph.outputs import in_order
from gdfq.models.registry import weights_hash
from gdfq.plan.plan import Plan
from gdfq.sources.base import joined_inputs
from gdfq.sources.collapse import CollapsedError
from gdfq.sources.stream import Feed
from gdfq.student.assignment import check_scheme
from gdfq.student.build import Student, build_student
from gdfq.student.equalization import channel_scales, rescaled
from gdfq.student.integer_network import IntegerNetwork
from gdfq.student.scheme import LayerBits, Scheme
from gdfq.tuning.calibrate import calibrate_
from gdfq.tuning.moment_matching import match_moments_, match_output_mean_
from gdfq.tuning.text_fitting import fit_weights_
from gdfq.version import __version__

Made = TypeVar("Made")

_PARTS = ("feed", "scales", "student", "done")
"""Registered parts that a restart drops, besides those of the tuning."""


@dataclass(frozen=True, eq=False)
class Marks:
    """Marks the stages that are over, and takes their time."""

    done: Results
    clock: Stopwatch
    context: Context

    def end(self, stage: str) -> None:
        """Mark a stage as over, and write a checkpoint."""
        self.done[stage] = True
        self.clock.lap(stage)
        self.context.checkpointer.stage_ends()
        release_freed_memory()


def generate_images(plan: Plan, context: Context) -> tuple[Plan, dict[str, float]]:
    """Make the images of a text-to-image model that the plan asks for.

    Those that are in their folder are not made again.

    Returns:
        The plan with the images, and the seconds that they took under "generate"; none of a plan
        without such images.

    Raises:
        UsageError: The pipeline cannot be used, or the folder holds other images.
    """
    if plan.generation is None:
        return plan, {}
    started = time.perf_counter()
    made = plan.generation.made(plan.teacher, plan.preprocessing, context)
    return plan.with_candidates(made), {"generate": time.perf_counter() - started}


def begin(plan: Plan, context: Context, generated: Mapping[str, float]) -> Stopwatch:
    """Read the checkpoint of the run, if there is one, and start the clock.

    Args:
        plan: The plan.
        context: The context of the run.
        generated: Seconds of making images before the run, by stage.

    Raises:
        UsageError: The checkpoint belongs to another run.
    """
    context.checkpointer.begin(identity_of(plan, context), environment_of(plan, context))
    context.group.wait()  # nothing is written before all processes have read
    return context.checkpointer.register("clock", Stopwatch({"capture": plan.seconds, **generated}))


def restarting_once(
    attempt: Callable[[Context], Made], plan: Plan, context: Context
) -> tuple[Made, str | None]:
    """Call `attempt`; if its generator collapses, drop its parts and call it with another seed.

    Args:
        attempt: Makes something with the seed of the context that it gets.
        plan: The plan of the run, whose tuning names its parts.
        context: Context of the run.

    Returns:
        What the attempt returned, and why there was a restart, if there was one.

    Raises:
        CollapsedError: The generator collapsed with the other seed, too.
    """
    origin = context.checkpointer.register("origin", Results(seed=context.seed))
    while True:
        try:
            made = attempt(replace(context, seed=origin["seed"]))
            return made, origin.get("collapsed")
        except CollapsedError as error:
            _choose_another_seed_(origin, context.seed, error)
            context.checkpointer.unregister(*_PARTS, *plan.recipe.tuning.parts)


def open_feed(plan: Plan, context: Context) -> Feed:
    """The batches of the plan's source, none of which is made yet.

    Raises:
        UsageError: The source cannot make images for this network, or the processes cannot share
            its batches.
    """
    if plan.recipe.tuning.trains:
        context.group.check_batch(plan.source.batch, f"recipe {plan.recipe.name}")
    stream = plan.source.stream(plan.teacher, steps=plan.recipe.steps, context=context)
    return context.checkpointer.register("feed", Feed(stream, plan.teacher.device))


def allocate_bits(
    plan: Plan, feed: Feed, context: Context, clock: Stopwatch
) -> tuple[Scheme, dict[str, Any] | None]:
    """The scheme, with each layer's bits chosen where the plan says a size instead of bits.

    Args:
        plan: The plan of the run.
        feed: The batches; those of a pool are made for the choice.
        context: Context of the run.
        clock: Takes the time of the choice.

    Returns:
        The scheme, and metrics that say what was chosen.

    Raises:
        UsageError: No choice is small enough.
    """
    if plan.size is None:
        return plan.scheme, None
    results = context.checkpointer.register("allocation", Results())
    if not results:
        card = plan.card(plan.scheme, context.seed)
        longest = dict.fromkeys(("teacher", "student"), 100.0)
        sizes = onnx_sizes(plan.teacher, plan.scheme, metadata_of(card, longest, safe=False))
        sizes.check(plan.size)  # before the images are made, which takes long
        chosen = choose_bits(
            plan.teacher,
            plan.scheme,
            plan.source.images_of(feed.stream, ALLOCATION_IMAGES),
            plan.size,
            sizes,
            listener=context.listener,
            memory=context.memory,
        )
        results["layer_bits"] = list(map(str, chosen.scheme.layer_bits))
        results["metrics"] = {
            "size": plan.size,
            "bytes": chosen.bytes,
            "bits": dict(chosen.bits),
        }
        clock.lap("allocate")
        context.checkpointer.stage_ends()
    layer_bits = tuple(map(LayerBits.parse, results["layer_bits"]))
    return replace(plan.scheme, layer_bits=layer_bits), results["metrics"]


def equalize(plan: Plan, scheme: Scheme, feed: Feed, context: Context) -> Captured:
    """The teacher with equalized channels, where the recipe's quantizers want that.

    The scales are found on the first images; they are the same after a stop and in all processes.

    Args:
        plan: The plan of the run.
        scheme: The scheme with the bits of all layers.
        feed: The batches; the first one is made.
        context: Context of the run.

    Raises:
        UsageError: The scheme finds nothing to quantize; this is before the images are made.
    """
    teacher, family = plan.teacher, plan.recipe.quantizers
    equalizer = plan.recipe.equalizer
    if equalizer is not None and scheme.bits.activations != UNROUNDED:
        check_scheme(teacher, scheme, family)
        feed.begin()
        changed = equalizer.equal(teacher, scheme, feed.examples, context.seed)
        if equalizer.exact:
            check_equal(teacher, changed, feed.examples)
        return changed
    if not family.equalizes:
        return teacher
    scales = context.checkpointer.register("scales", Results())
    if not scales:
        check_scheme(teacher, scheme, family)
        feed.begin()
        scales.update(channel_scales(teacher, scheme, *feed.examples))
        # A search ends elsewhere where devices round differently.
        context.group.broadcast_(scales.values())
    return rescaled(teacher, {name: s.to(teacher.device) for name, s in scales.items()})


def build(plan: Plan, scheme: Scheme, teacher: Captured, context: Context) -> Student:
    """The trainable student of a teacher, whose ranges are not known yet.

    Args:
        plan: The plan of the run.
        scheme: The scheme with the bits of all layers.
        teacher: The teacher that `equalize` returned.
        context: Context of the run; a resumed run restores the student.
    """
    student = build_student(
        teacher,
        scheme,
        quantizers=plan.recipe.quantizers,
        fixed_statistics=plan.recipe.tuning.fixed_statistics,
    )
    return context.checkpointer.register("student", student.eval())


def calibrate(
    plan: Plan, student: Student, teacher: Captured, feed: Feed, context: Context, marks: Marks
) -> None:
    """Find the activation ranges on the first batches, and match the teacher's moments.

    Args:
        plan: The plan of the run.
        student: The student, changed in place.
        teacher: The teacher that `equalize` returned.
        feed: The batches, none of which the student has seen.
        context: Context of the run.
        marks: Marks of the stages that are over.
    """
    recipe = plan.recipe
    if "calibrate" in marks.done:
        return
    calibrate_(
        student,
        feed.until(
            recipe.calibration,
            hold=recipe.match_moments or recipe.fit_weights or recipe.tuning.holds_batches,
        ),
        first_step=feed.taken,
        steps=recipe.calibration,
        context=context,
    )
    if recipe.match_moments:
        release_freed_memory()
        with _begun_again_on_resume(student, context):
            match_moments_(
                student,
                teacher,
                joined_inputs(feed.held),
                context,
                fit_weights=recipe.fit_weights,
            )
    elif recipe.fit_weights:
        fit_weights_(student, teacher, joined_inputs(feed.held), context)
    # All processes saw the same batches: they differ at most by the rounding of their devices.
    context.group.broadcast_(student.state_dict().values())
    marks.end("calibrate")


@contextmanager
def _begun_again_on_resume(student: Student, context: Context) -> Iterator[None]:
    """Within this context checkpoints hold the student as it is at the start.

    For what changes a student in a way that cannot continue from its middle.
    """
    context.checkpointer.register("student", Results(deepcopy(student.state_dict())))
    yield
    context.checkpointer.register("student", student)


def tune(
    plan: Plan, student: Student, teacher: Captured, feed: Feed, context: Context, marks: Marks
) -> None:
    """Let the generator warm up while the student waits, then tune the student.

    The calls of a sampler repeat the mean error of a denoiser, so its predictions get the teacher's
    mean at the end, on the last points that it saw.

    Args:
        plan: The plan of the run.
        student: The calibrated student, changed in place.
        teacher: The teacher that `equalize` returned.
        feed: The batches from the one after calibration on.
        context: Context of the run.
        marks: Marks of the stages that are over.
    """
    recipe = plan.recipe
    if not recipe.tuning.trains or "tune" in marks.done:
        return
    if "warmup" not in marks.done:
        for batch in feed.until(recipe.warmup):
            context.listener(Step("warmup", feed.taken, recipe.warmup, batch.losses))
        marks.end("warmup")
    recipe.tuning.run_(
        student,
        teacher,
        feed,
        first_step=recipe.warmup,
        total_steps=recipe.steps,
        batch=recipe.source.batch,
        context=context,
    )
    if plan.sampler is not None and (seen := feed.recent.inputs()) is not None:
        match_output_mean_(student, recipe.quantizers.prepared(teacher), seen[0], context.memory)
        context.group.broadcast_(student.state_dict().values())
    context.checkpointer.unregister(*recipe.tuning.parts)  # what trains is not needed any more
    marks.end("tune")


@contextmanager
def memory_errors_explained(plan: Plan) -> Iterator[None]:
    """Convert a shortage of memory into an error that says what fits."""
    with batch_that_fits_suggested(
        plan.source.most_at_once, partial(_forward_and_backward, plan.teacher)
    ):
        yield


def measure(
    plan: Plan, network: IntegerNetwork, context: Context
) -> tuple[TestPredictions | None, dict[str, Any]]:
    """Measure teacher and student on the test images; the first process alone does it.

    Args:
        plan: The plan of the run, which has the test images.
        network: The frozen student.
        context: Context of the run.

    Returns:
        The predictions for labelled images of a classifier, and metrics. None and no metrics
        without test images, and in other processes.
    """
    teacher, images, preprocessing = plan.teacher, plan.test, plan.preprocessing
    if context.group.rank != 0:
        return None, {}
    if teacher.vocabulary is not None:
        return None, _language_metrics(plan, network, context)
    if images is None:
        return None, {}
    metrics: dict[str, Any] = {"test_images": len(images)}
    if images.labels is not None and teacher.classes is not None:
        tested = TestPredictions.of(
            teacher, network, images, preprocessing, context.listener, context.memory
        )
        predictions = {"teacher": tested.teacher, "student": tested.student}
        top1 = {who: {"top1": round(p.top1(tested.labels), 4)} for who, p in predictions.items()}
        return tested, metrics | {"test_data": summary_of(images)} | top1
    found = output_similarities(
        network,
        teacher,
        images,
        preprocessing,
        listener=context.listener,
        memory=context.memory,
    )
    student: dict[str, Any] = {"error_percent": {}}
    for name, similarity in zip(body_names(teacher, teacher.ends), found, strict=True):
        student["error_percent"][name] = round(similarity.relative_error, 4)
        if similarity.cosine is not None:
            student.setdefault("cosine", {})[name] = round(similarity.cosine, 6)
        if similarity.decisions is not None:
            student.setdefault("decisions_percent", {})[name] = round(similarity.decisions, 4)
    return None, metrics | {"student": student}


def _language_metrics(plan: Plan, network: IntegerNetwork, context: Context) -> dict[str, Any]:
    """Measure a language model on held-out own text, and on the test text if there is any."""
    teacher, test = plan.teacher, plan.test
    own = held_out_measures(network, teacher, seed=context.seed, listener=context.listener)
    metrics: dict[str, Any] = {"own_text": as_metrics(own)}
    if test is not None:
        (tokens,) = network_inputs(test, torch.arange(len(test)), plan.preprocessing)
        found = language_measures(
            network,
            teacher.network,
            tokens,
            device=teacher.device,
            listener=context.listener,
        )
        metrics |= {"test_sequences": len(test), "language": as_metrics(found)}
    return metrics


def compare_generated(
    plan: Plan, network: IntegerNetwork, context: Context
) -> SampleComparison | None:
    """Compare the images that a denoiser and its student generate; the first process does it.

    Args:
        plan: The plan of the run.
        network: The frozen student.
        context: Context of the run.

    Returns:
        The comparison; None for other networks, without samples, and in other processes.
    """
    if plan.sampler is None or not plan.samples or context.group.rank != 0:
        return None
    return compare_samples(plan.teacher, network, plan.sampler, plan.samples, context=context)


def identity_of(plan: Plan, context: Context) -> dict[str, Any]:
    """Which run it is, in plain values: a checkpoint of another one is refused."""
    network = plan.teacher.network
    return {
        "gdfq": __version__,
        "network": [weights_hash(network), name_of(network.code.encode())],
        "data": None if plan.given is None else summary_of(plan.given),
        "candidates": None
        if plan.candidates is None
        else [
            plan.candidates.kind,
            summary_of(plan.candidates.data, complete=False),
            frozen_values(plan.candidates.screen),
        ],
        "input_limits": plan.teacher.input_limits,
        "size": plan.size,
        "recipe": frozen_values(plan.recipe),
        "card": frozen_values(plan.card(plan.scheme, context.seed)),
        "grids": frozen_values(plan.scheme.grids),
        "group_size": plan.scheme.group_size,
        "new_biases": plan.scheme.new_biases,
        "denoiser": plan.scheme.denoiser,
        "precision": context.precision,
    }


def environment_of(plan: Plan, context: Context) -> dict[str, Any]:
    """What the rounding of a run depends on: another environment is a warning."""
    return {
        "torch": torch.__version__,
        "device": str(plan.teacher.device),
        "threads": torch.get_num_threads(),
        "processes": context.group.size,
        "memory": context.memory.bytes,
    }


def _choose_another_seed_(origin: Results, seed: int, error: CollapsedError) -> None:
    """Choose a seed to restart from. Raises CollapsedError when that was done before."""
    if "collapsed" in origin:
        raise CollapsedError(
            f"{error} The same happened with another seed: {origin['collapsed']} "
            "Use a recipe without a generator, such as fast."
        ) from error
    origin["collapsed"] = str(error)
    origin["seed"] = random_stream(seed, "another seed").initial_seed()
    warnings.warn(f"{error} The run restarts from another seed.", GdfqWarning, stacklevel=3)


def _forward_and_backward(teacher: Captured, images: int) -> None:
    """Pass so many images forward and backward, as a training step does."""
    inputs = [spec.zeros(images, teacher.device) for spec in teacher.inputs]
    for tensor in inputs:
        tensor.requires_grad_(tensor.is_floating_point())
    with torch.enable_grad():
        torch.stack(
            [output.sum() for output in in_order(teacher.network(*inputs))]
        ).sum().backward()
