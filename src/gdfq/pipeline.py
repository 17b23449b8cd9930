"""The whole method: what a run does, from a plan to a quantized network."""

from dataclasses import replace
from functools import partial

from torch import Tensor

from gdfq import stages
from gdfq.analysis.observations import Observations
from gdfq.errors import UsageError
from gdfq.execution.context import Context
from gdfq.execution.guards import smaller_budget_suggested
from gdfq.execution.precision import in_full_float32
from gdfq.execution.stopwatch import Stopwatch
from gdfq.execution.tracing import allowing_tracing, without_concurrent_tracing
from gdfq.files.states import Results
from gdfq.graph.capture import Captured
from gdfq.graph.tensors import tensors_of
from gdfq.plan.plan import Plan
from gdfq.quantized import QuantizedNetwork
from gdfq.recipes import Recipe
from gdfq.student.freeze import freeze


@without_concurrent_tracing
def run(plan: Plan, context: Context = Context()) -> QuantizedNetwork:
    """Quantize: source -> bits -> equalize -> student -> calibrate -> tune -> freeze -> measure.

    Images of a text-to-image model are made before all others, if the plan asks for them.
    The network was captured for the plan. Every stage resumes where it stopped; a run whose
    generator collapses restarts once, from another seed.

    Raises:
        UsageError: The plan cannot be carried out: the scheme finds nothing to quantize, the source
            cannot make images for this network, or the checkpoint belongs to another run.
        GdfqError: The run fails: a loss is not finite, memory is short, or a process died.
    """
    with in_full_float32(plan.teacher.device):
        return _run(plan, context)


def _run(plan: Plan, context: Context) -> QuantizedNetwork:
    plan, generated = stages.generate_images(plan, context)
    listener = allowing_tracing(context.checkpointer.listening(context.listener))
    context = replace(context, listener=listener)
    with context.checkpointer:
        clock = stages.begin(plan, context, generated)
        attempt = partial(_quantize, plan, clock, context.seed)
        quantized, restart = stages.restarting_once(attempt, plan, context)
        if restart is not None:
            quantized.metrics["collapsed"] = restart
        return quantized


def _quantize(plan: Plan, clock: Stopwatch, seed: int, context: Context) -> QuantizedNetwork:
    """Quantize from the context's seed, which after a restart is not the run's `seed`."""
    feed = stages.open_feed(plan, context)
    with stages.memory_errors_explained(plan):
        scheme, allocation = stages.allocate_bits(plan, feed, context, clock)
        teacher = stages.equalize(plan, scheme, feed, context)
        student = stages.build(plan, scheme, teacher, context)
        done = context.checkpointer.register("done", Results())
        marks = stages.Marks(done, clock, context)
        stages.calibrate(plan, student, teacher, feed, context, marks)
        stages.tune(plan, student, teacher, feed, context, marks)
        network = freeze(student)
        clock.lap("freeze")
    seconds = clock.seconds()
    with smaller_budget_suggested(
        "measuring on the test images", context.memory.room(plan.teacher.device)
    ):
        tested, measured = stages.measure(plan, network, context)
        samples = stages.compare_generated(plan, network, context)
    if samples is not None:
        measured["samples"] = samples.as_values()
    if plan.test is not None or samples is not None:
        clock.lap("test")
        seconds["test"] = clock.seconds()["test"]  # no part of the total
    metrics = {
        "seconds": seconds,
        "steps": plan.recipe.steps,
        "effort": plan.effort_options,
        "float_bytes": sum(tensor.nbytes for tensor in tensors_of(plan.teacher.network).values()),
        **measured,
    }
    if allocation is not None:
        metrics["allocation"] = allocation
    screening = plan.source.screening_of(feed.stream)
    card = plan.card(scheme, seed)
    if screening is not None:
        metrics["candidates"] = screening.as_values()
        card = replace(card, candidates=str(screening))
    observed = Observations(
        *(feed.recent.inputs() or (feed.examples, None)),
        teacher,
        tested,
        plan.candidates,
        screening,
        plan.decode,
        plan.sampler is not None,
        samples,
    )
    return QuantizedNetwork(network, card, metrics, feed.examples, observed, plan.teacher.ends)


@without_concurrent_tracing
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
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise UsageError(f"count must be a positive whole number; got {count!r}.")
    context = replace(context, listener=allowing_tracing(context.listener))
    device = teacher.device
    with (
        smaller_budget_suggested("making images", context.memory.room(device)),
        in_full_float32(device),
    ):
        images, labels = recipe.source.make_images(
            teacher, count, steps=steps, planned=recipe.steps, context=context
        )
    return images.cpu(), None if labels is None else labels.cpu()
