"""From options to a plan."""

import time
import warnings
from dataclasses import replace
from typing import Unpack

from gdfq.analysis.samples import SAMPLES
from gdfq.errors import GdfqWarning, UsageError
from gdfq.execution.context import Context
from gdfq.functional.grid import UNROUNDED, Bits
from gdfq.graph.capture import Captured, ExampleInputs
from gdfq.graph.inputs import image_shape, takes_images
from gdfq.plan.budget import within_budget
from gdfq.plan.elsewhere import check_images, planned_generation
from gdfq.plan.images import GivenImages, source_of
from gdfq.plan.method import Method, resolve_method
from gdfq.plan.network import Network, resolve_network
from gdfq.plan.options import (
    ImageOptions,
    MethodOptions,
    Model,
    NetworkOptions,
    PlanOptions,
    options_of,
)
from gdfq.plan.plan import Plan, Timing
from gdfq.recipes import Recipe


def resolve(
    model: Model,
    example_input: ExampleInputs | None = None,
    bits: str | Bits | None = None,
    recipe: str | Recipe = "fast",
    *,
    context: Context = Context(),
    timing: Timing = Timing(),
    **options: Unpack[PlanOptions],
) -> Plan:
    """Parse and check all options of a run.

    What is cheap to check is checked first: options, then the network, then the images.

    Args:
        model: The network.
        example_input: An input of the network [N, ...], for a `model` that is a module.
        bits: Bits of weights and activations, 2..8 each, as "w4a8"; or "auto". None is w4a8, which
            runtimes compute as fast as w4a4; or w4a4 in placement relu, the published protocol.
        recipe: A name in `gdfq.RECIPES`, or a recipe.
        context: Context of the run. A plan with a budget depends on it.
        timing: What the time of the run consists of. A plan with a budget depends on it.
        **options: See `PlanOptions`.

    Raises:
        UsageError: An option, the network or the images cannot be used.
        TypeError: There is no such option.
    """
    if unknown := options.keys() - PlanOptions.__annotations__.keys():
        raise TypeError(
            f"options must be among {', '.join(sorted(PlanOptions.__annotations__))}; "
            f"got {', '.join(sorted(unknown))}."
        )
    images: ImageOptions = options_of(options, ImageOptions)
    method = resolve_method(bits, recipe, **options_of(options, MethodOptions))
    check_images(method, images)
    network = resolve_network(model, example_input, **options_of(options, NetworkOptions))
    return plan_of(network, method, context=context, timing=timing, **images)


def plan_of(
    network: Network,
    method: Method,
    *,
    context: Context = Context(),
    timing: Timing = Timing(),
    **images: Unpack[ImageOptions],
) -> Plan:
    """Fit a method to a network, read the images, and choose the effort for a budget.

    Args:
        network: The captured network.
        method: What is to be done.
        context: Context of the run, whose checkpoint may have the effort. Only a budget needs it.
        timing: What the time of the run consists of. Only a budget needs it.
        **images: See `ImageOptions`.

    Raises:
        UsageError: The images cannot be used, or the budget is too small.
    """
    check_images(method, images)
    started = time.perf_counter() if timing.started is None else timing.started
    teacher, preprocessing, names = network.teacher, network.preprocessing, network.class_names
    given = images.get("data") is not None
    recipe = _fitted(method, network, given=given)
    scheme = method.scheme.for_network(teacher)
    scheme = replace(scheme, denoiser=network.sampler is not None)
    _check_test(network, images)
    generation = images.get("generate_with")
    planned = None if generation is None else planned_generation(generation, recipe, teacher, names)
    read = GivenImages.read(images, network)
    source = source_of(recipe, read.data, preprocessing, read.candidates)
    if read.data is None and not source.within_limits:
        teacher = replace(teacher, input_limits=None)  # the student would clip these images
    if method.target is not None:
        method.target.check_scheme(teacher, scheme)
    plan = Plan(
        read.limiting(teacher),
        scheme,
        recipe,
        source,
        preprocessing,
        method.size,
        read.data,
        read.test,
        read.candidates,
        planned,
        network.weights_sha256,
        network.seconds,
        network.notes,
        method.effort.budget,
        target=method.target,
        decode=network.decode,
        sampler=network.sampler,
        samples=_samples(network, images),
        class_names=names,
    )
    if plan.budget is None:
        return plan
    assert method.untuned is not None
    untuned = _fitted(replace(method, recipe=method.untuned), network, given=given)
    following = replace(timing.following, capture_seconds=network.capture_seconds)
    timing = replace(timing, started=started, following=following)
    return within_budget(plan, method, untuned, context, timing)


def _samples(network: Network, images: ImageOptions) -> int:
    """Return how many images are generated to compare a denoiser with its student.

    Raises:
        UsageError: It is no number, or the network is no denoiser.
    """
    count = images.get("samples")
    if count is None:
        return SAMPLES
    if network.sampler is None:
        raise UsageError(
            "samples are for denoisers of diffusion models, which have a scheduler; this network "
            "has none. Give test images, or --scheduler."
        )
    if not isinstance(count, int) or count < 0:
        raise UsageError(f"samples must be a whole number of at least 0; got {count}.")
    return count


def _check_test(network: Network, images: ImageOptions) -> None:
    """Raise UsageError for test images of a denoiser."""
    if network.sampler is not None and images.get("test") is not None:
        raise UsageError(
            "test images are for networks that classify or map images; a denoiser is measured on "
            "images that it generates: teacher and student start from the same noise, and their "
            "images are compared. Remove test; samples is the number of these images."
        )


def _fitted(method: Method, network: Network, *, given: bool) -> Recipe:
    """Return the recipe for the network's inputs and for the effort that the user asks for."""
    recipe, teacher = method.recipe, network.teacher
    _check_kind(method, teacher)
    if network.sampler is not None and not given:
        return method.effort.of_trajectories(recipe, network.sampler)
    if teacher.vocabulary is not None:
        recipe = _with_equalizer(recipe, method, teacher)
        recipe = recipe.fitted((teacher.vocabulary.length,))
    elif takes_images(teacher.inputs):
        recipe = recipe.fitted(teacher.input_shape)
    elif not given:
        image_shape(teacher.inputs)  # raises: sources make images alone
    return method.effort.of_given(recipe) if given else method.effort.of_images(recipe)


def _with_equalizer(recipe: Recipe, method: Method, teacher: Captured) -> Recipe:
    """Return a recipe whose equalizer can change the model: its own, or none with a warning.

    Raises:
        UsageError: The user says an equalizer that cannot.
    """
    if recipe.equalizer is None or method.scheme.bits.activations == UNROUNDED:
        return recipe
    target = method.target
    try:
        recipe.equalizer.check(teacher)
        if target is not None and target.holds_weights_alone and not recipe.equalizer.folds:
            raise UsageError(
                f"target {target.name!r} holds weights for the code of the original, and this "
                "equalizer changes what enters layers while the model runs. Use equalizer "
                "'smooth' or 'none', or target 'safetensors'."
            )
    except UsageError as error:
        if method.equalizer_said:
            raise
        warnings.warn(f"no equalizer is used: {error}", GdfqWarning, stacklevel=2)
        return replace(recipe, equalizer=None)
    return recipe


def _check_kind(method: Method, teacher: Captured) -> None:
    """Raise UsageError for a recipe or a size that is not for this kind of network."""
    recipe, of_text = method.recipe, method.scheme.placement == "tokens"
    if teacher.vocabulary is not None and not of_text:
        raise UsageError(
            f"a language model needs a recipe for text; {recipe.name!r} is for images. "
            "Use recipe 'text'."
        )
    if teacher.vocabulary is None and of_text:
        raise UsageError(
            f"recipe {recipe.name!r} is for causal language models; this network takes "
            f"{', '.join(map(str, teacher.inputs))}. Use another recipe, such as 'fast'."
        )
    if of_text and (method.size is not None or method.effort.budget is not None):
        raise UsageError(
            "a size or a budget is for networks of images; a language model was given. Give the "
            "bits, as w4a8, and the number of steps."
        )
    if method.size is not None:
        image_shape(teacher.inputs, needs="bits 'auto' need", advice="Give the bits, as w4a8.")
