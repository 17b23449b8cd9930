"""The whole method: source -> bits -> student -> calibrate -> tune -> freeze -> observe."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gdfq.analysis.accuracy import output_errors
from gdfq.analysis.bit_allocation import choose_widths, file_sizes
from gdfq.analysis.observations import Tested, Witness
from gdfq.data.datasets import summary_of
from gdfq.deploy.metadata import metadata_of
from gdfq.errors import GdfqWarning, UsageError
from gdfq.execution.context import Context
from gdfq.execution.guards import told_of_shortage
from gdfq.execution.seeding import stream as random_stream
from gdfq.execution.stopwatch import Clock
from gdfq.execution.tracing import beside_no_tracing, giving_way
from gdfq.files.plain_values import frozen_values
from gdfq.files.states import Results, name_of
from gdfq.graph.capture import Captured
from gdfq.graph.outputs import in_order, output_names
from gdfq.graph.tensors import tensors_of
from gdfq.models.registry import weights_hash
from gdfq.plan import Plan
from gdfq.quantized import QuantizedNetwork
from gdfq.recipes import Recipe
from gdfq.sources.collapse import CollapsedError
from gdfq.sources.stream import Feed
from gdfq.stages import STUDENT_PARTS, frozen_student
from gdfq.student.integer_network import IntegerNetwork
from gdfq.student.scheme import LayerBits, Scheme
from gdfq.version import __version__


@beside_no_tracing
def run(plan: Plan, context: Context = Context()) -> QuantizedNetwork:
    """Carry a plan out: every stage resumes where it stopped.

    A run whose generator collapses restarts once, from another seed.

    Raises:
        UsageError: The plan cannot be carried out: the scheme finds nothing to quantize, the source
            cannot make images for this network, or the checkpoint belongs to another run.
        GdfqError: The run fails: a loss is not finite, memory is short, or a process died.
    """
    listener = giving_way(context.checkpointer.listening(context.listener))
    context = replace(context, listener=listener)
    with context.checkpointer as checkpointer:
        checkpointer.begin(_identity(plan, context), _environment(plan, context))
        context.group.wait()  # nothing is written before all processes have read
        clock = checkpointer.register("clock", Clock({"capture": plan.seconds}))
        origin = checkpointer.register("origin", Results(seed=context.seed))
        while True:
            try:
                made = _make_student(plan, replace(context, seed=origin["seed"]), clock)
                break
            except CollapsedError as error:
                _choose_another_seed_(origin, context.seed, error)
                checkpointer.unregister("feed", *STUDENT_PARTS, *plan.recipe.tuning.parts)
        return _observe(plan, made, context, {**origin, "seconds": clock.seconds()})


@dataclass(frozen=True, eq=False)
class _Made:
    """A frozen student, and what it was made from."""

    network: IntegerNetwork
    scheme: Scheme
    equalized: Captured
    feed: Feed
    allocation: dict[str, Any] | None


def _make_student(plan: Plan, context: Context, clock: Clock) -> _Made:
    """Source -> bits -> student -> calibrate -> tune -> freeze, from one seed."""
    teacher, recipe = plan.teacher, plan.recipe
    if recipe.tuning.trains:
        context.group.check_batch(plan.source.batch, f"recipe {recipe.name}")
    stream = plan.source.stream(teacher, steps=recipe.steps, context=context)
    feed = context.checkpointer.register("feed", Feed(stream, teacher.device))
    scheme, allocation = plan.scheme, None
    if plan.size is not None:
        scheme, allocation = _allocate_bits(plan, plan.size, feed, context, clock)
    with told_of_shortage(plan.source.most_at_once, partial(_pass_through, teacher)):
        network, equalized = frozen_student(
            teacher, scheme, recipe, feed, context=context, lap=clock.lap
        )
    return _Made(network, scheme, equalized, feed, allocation)


def _observe(
    plan: Plan, made: _Made, context: Context, notes: Mapping[str, Any]
) -> QuantizedNetwork:
    """Measure the student on the test images, and put everything together."""
    tested, measured = _measure(plan, made.network, context)
    float_bytes = sum(tensor.nbytes for tensor in tensors_of(plan.teacher.network).values())
    optional = {"allocation": made.allocation, "collapsed": notes.get("collapsed")}
    metrics = {
        **{name: value for name, value in optional.items() if value is not None},
        "seconds": notes["seconds"],
        "steps": plan.recipe.steps,
        **measured,
        "float_bytes": float_bytes,
    }
    recent = made.feed.recent.images() or (made.feed.examples, None)
    return QuantizedNetwork(
        made.network,
        plan.card(made.scheme, context.seed),
        metrics,
        made.feed.examples,
        Witness(*recent, made.equalized, tested),
    )


def _measure(
    plan: Plan, network: IntegerNetwork, context: Context
) -> tuple[Tested | None, dict[str, Any]]:
    """Teacher and student on the test images, if there are any; the first process alone does it."""
    teacher, images, preprocessing = plan.teacher, plan.test, plan.preprocessing
    if images is None or context.group.rank != 0:
        return None, {}
    metrics: dict[str, Any] = {"test_images": len(images)}
    if images.labels is not None and teacher.classes is not None:
        tested = Tested.of(
            teacher, network, images, preprocessing, context.listener, context.memory
        )
        predictions = {"teacher": tested.teacher, "student": tested.student}
        top1 = {who: {"top1": round(p.top1(tested.labels), 4)} for who, p in predictions.items()}
        return tested, metrics | top1
    errors = output_errors(
        network,
        teacher.network,
        images,
        preprocessing,
        device=teacher.device,
        listener=context.listener,
        memory=context.memory,
    )
    percent = dict(zip(output_names(teacher), (round(e, 4) for e in errors), strict=True))
    return None, metrics | {"student": {"error_percent": percent}}


def _identity(plan: Plan, context: Context) -> dict[str, Any]:
    """Which run it is, in plain values: a checkpoint of another one is refused."""
    network = plan.teacher.network
    return {
        "gdfq": __version__,
        "network": [weights_hash(network), name_of(network.code.encode())],
        "data": None if plan.given is None else summary_of(plan.given),
        "size": plan.size,
        "recipe": frozen_values(plan.recipe),
        "card": frozen_values(plan.card(plan.scheme, context.seed)),
        "precision": context.precision,
    }


def _environment(plan: Plan, context: Context) -> dict[str, Any]:
    """What the rounding of a run depends on: another environment is a warning."""
    return {
        "torch": torch.__version__,
        "device": str(plan.teacher.device),
        "threads": torch.get_num_threads(),
        "processes": context.group.size,
    }


def _allocate_bits(
    plan: Plan, size: int, feed: Feed, context: Context, clock: Clock
) -> tuple[Scheme, dict[str, Any]]:
    """Choose each layer's bits to fit a size; also returns the metrics that say so."""
    results = context.checkpointer.register("allocation", Results())
    if not results:
        card = plan.card(plan.scheme, context.seed)
        full = dict.fromkeys(("teacher", "student"), 100.0)
        sizes = file_sizes(plan.teacher, plan.scheme, metadata_of(card, full, safe=False))
        sizes.check(size)  # before the images are made, which takes long
        images = plan.source.images_of(feed.stream)
        chosen = choose_widths(
            plan.teacher, plan.scheme, images, size, sizes, listener=context.listener
        )
        results["layer_bits"] = list(map(str, chosen.scheme.layer_bits))
        results["metrics"] = {"size": size, "bytes": chosen.bytes, "widths": dict(chosen.widths)}
        clock.lap("allocate")
        context.checkpointer.stage_ends()
    return replace(
        plan.scheme, layer_bits=tuple(map(LayerBits.parse, results["layer_bits"]))
    ), results["metrics"]


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


def _pass_through(teacher: Captured, images: int) -> None:
    """Forward and backward of so many images, as a step on them does."""
    inputs = torch.zeros(images, *teacher.input_shape, device=teacher.device, requires_grad=True)
    with torch.enable_grad():
        torch.stack([output.sum() for output in in_order(teacher.network(inputs))]).sum().backward()


@beside_no_tracing
def make_images(
    teacher: Captured, recipe: Recipe, count: int, context: Context, *, steps: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """Make synthetic images alone.

    The first images of a pool are those that the recipe would tune on. Any other source runs the
    recipe's `steps`, or as many as `count` images need if that is more; the images are its last
    ones, when a generator has learned most.

    Returns:
        Images [count, *input_shape] as the network takes them, and their labels [count] if it has
        classes, both on the CPU.

    Raises:
        UsageError: The source cannot make images for this network, or takes no steps.
        GdfqError: A loss is not finite.
    """
    if count < 1:
        raise UsageError(f"count must be at least 1; got {count}.")
    context = replace(context, listener=giving_way(context.listener))
    images, labels = recipe.source.make_images(
        teacher, count, steps=steps, planned=recipe.steps, context=context
    )
    return images.cpu(), None if labels is None else labels.cpu()
