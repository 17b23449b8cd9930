"""The plan of a run: every option parsed and checked once.

The command line, `gdfq.quantize`, `gdfq.generate`, `doctor` and the benchmarks resolve their
options here and pass the values on. After a plan is made, nothing parses an option or loads a
network again.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor, nn

from gdfq.analysis.bit_allocation import parse_bits
from gdfq.analysis.run_costs import Following, measure_costs
from gdfq.data.class_names import ClassNames
from gdfq.data.datasets import ImageData, how_labelled, load_unlabelled
from gdfq.data.preprocessing import PerChannel, Preprocessing, Resize, normalisation
from gdfq.data.tensors import Data as GivenData
from gdfq.data.tensors import TensorData
from gdfq.deploy.card import Card
from gdfq.deploy.export import named_target
from gdfq.deploy.target import Target
from gdfq.effort import Effort, effort_within
from gdfq.errors import UsageError
from gdfq.execution.context import Context
from gdfq.execution.durations import seconds_of
from gdfq.execution.precision import find_device
from gdfq.files.plain_values import as_values
from gdfq.files.states import Results
from gdfq.functional.grid import Bits
from gdfq.graph.capture import Captured, ExampleInputs, capture
from gdfq.graph.ends import describe
from gdfq.graph.inputs import image_shape, takes_images
from gdfq.graph.wrappers import unwrapped
from gdfq.models.loaded import names_of
from gdfq.models.registry import Loaded, load_model, weights_hash
from gdfq.recipes import Recipe, effort_rule, find_recipe, recipe_for
from gdfq.sources.base import Source
from gdfq.sources.candidates import Candidates
from gdfq.sources.given import load_given, on_images
from gdfq.student.build import check_family
from gdfq.student.scheme import (
    GridRules,
    LayerBits,
    Placement,
    Scheme,
    parse_placement,
    with_ends,
)

Model = str | nn.Module | Captured
"""A network: a name as the command line takes it, a module, or a network that was captured."""
Tensors = Mapping[str, Tensor]
Data = (
    str
    | Path
    | Tensor
    | tuple[Tensor, Tensor]
    | ImageData
    | Tensors
    | tuple[Tensors, Tensor]
    | TensorData
)
"""Images: an .npz file, an image folder, a tensor, or images and their labels."""


DEFAULT_BITS: Mapping[Placement, str] = {"full": "w4a8", "relu": "w4a4"}
"""Bits by placement. The published protocol is at w4a4. Runtimes compute activations of 4 bits in
containers of 8, so that w4a8 is as small and as fast as w4a4, and loses far less."""


class NetworkOptions(TypedDict, total=False):
    """Options that say which network it is, and what it takes.

    Attributes:
        weights: A safetensors file or a torch state dict to load into the network, or "random" for
            a library's network without its pretrained weights. For a `model` that is a name.
        input_shape: The shape of one input, such as (3, 32, 32), for a `model` that is a name and
            does not say it.
        mean: Mean of the input normalisation for pixels in 0..1: a number for each channel (a
            sequence, an array or a tensor), or one number for all.
        std: Standard deviation of the input normalisation for pixels in 0..1, as `mean`.
        resize: How the files of an image folder get the network's size.
        classifier: Whether the output is of classes: their logits or, behind a softmax, their
            probabilities. By default it is if it is one tensor [N, C] with C >= 2 that is no
            sigmoid and no unit vector. Any other network (detection, segmentation, regression) has
            no labels: its outputs themselves are matched, relative to their size.
        device: "cpu", "cuda" or "auto".
    """

    weights: str | Path | None
    input_shape: tuple[int, ...] | None
    mean: PerChannel | None
    std: PerChannel | None
    resize: Resize | None
    classifier: bool | None
    device: str


class MethodOptions(TypedDict, total=False):
    """Options that change a recipe.

    Attributes:
        size: With bits "auto": the size of the ONNX file in bytes, at most.
        placement: "full" (deployable) or "relu" (weights and ReLU outputs alone, the protocol of
            the published tables). By default the recipe's own.
        layer_bits: Layers with other bits, as "stage1.*=float" or "last=8"; the first pattern that
            matches a layer counts. With 2 bits of weights or activations the first and the last
            layer of a deployable network have 8 unless they are named here.
        steps: Batches in total. By default the recipe's own.
        images: Images that are made before the student learns. By default the recipe's own.
        iterations: Updates of each of these images. By default the recipe's own.
        batch: Images in a batch. By default the recipe's own.
        budget: The time of the whole run, in seconds or as "5m": images, iterations and steps are
            chosen for it from one measured step of each kind.
        target: Where the result is to run: a name in `gdfq.TARGETS` or a `Target`. What it cannot
            express is refused before the run.
    """

    size: int | None
    placement: str | None
    layer_bits: Sequence[str]
    steps: int | None
    images: int | None
    iterations: int | None
    batch: int | None
    budget: str | float | None
    target: str | Target | None


class PlanOptions(NetworkOptions, MethodOptions, total=False):
    """All options of a plan, apart from those that are arguments of their own."""


@dataclass(frozen=True, eq=False)
class Network:
    """A captured network on its device, and how images become its inputs.

    Attributes:
        teacher: The captured network.
        preprocessing: From pixels to its inputs.
        assumed: The parts of the normalisation ("mean", "std") that are neither given nor known:
            0 and 1 were taken.
        weights_sha256: A hash of the weights, as the user's network has them.
        seconds: How long loading and capturing took.
        class_names: What the outputs stand for, where the network says it.
        notes: What was taken of the weights file, for the user.
        capture_seconds: How long capturing alone took.
    """

    teacher: Captured
    preprocessing: Preprocessing
    weights_sha256: str
    assumed: tuple[str, ...] = ()
    seconds: float = 0.0
    class_names: ClassNames | None = None
    notes: tuple[str, ...] = ()
    capture_seconds: float = 0.0


@dataclass(frozen=True)
class Method:
    """What is to be done, before it is fitted to a network.

    Attributes:
        scheme: What is quantized, to how many bits.
        recipe: The recipe, with its placement and steps.
        size: The size of the ONNX file in bytes, where bits are to be chosen for it.
        batch: Images in a batch, where the user says it.
        images: Images that are made, where the user says it.
        iterations: Updates of each image, where the user says it.
        budget: Seconds of the whole run, where images, iterations and steps are chosen for them.
        target: Where the result is to run, where the user says it.
    """

    scheme: Scheme
    recipe: Recipe
    size: int | None = None
    batch: int | None = None
    images: int | None = None
    iterations: int | None = None
    budget: float | None = None
    target: Target | None = None


@dataclass(frozen=True)
class Timing:
    """What the time of a run consists of besides the run, for a plan with a budget.

    Attributes:
        started: When the time began, by `time.perf_counter`; None if it begins with the plan.
        following: What follows the run. Its `capture_seconds` are those of the plan's network.
    """

    started: float | None = None
    following: Following = Following()  # noqa: RUF009 (frozen)


@dataclass(frozen=True, eq=False)
class Plan:
    """A run, resolved: what is quantized, how, and on which images.

    Attributes:
        teacher: The captured full-precision network, on its device.
        scheme: What is quantized, to how many bits.
        recipe: The recipe, fitted to the network's input.
        source: Where the images come from: the recipe's source, or the given images.
        preprocessing: From pixels to the network's inputs.
        size: The size of the ONNX file in bytes, where bits are to be chosen for it.
        given: Real images that the source draws from.
        test: Images that teacher and student are measured on, and that nothing else sees.
        candidates: Images from elsewhere, of which a screen adds some to those of the source.
        weights_sha256: A hash of the weights, as the user's network has them; by it, runs of the
            same network are recognised.
        seconds: How long loading and capturing the network took.
        notes: What was taken of the weights file, for the user.
        budget: Seconds of the whole run, for which images, iterations and steps were chosen.
        planned_seconds: Seconds that the run was expected to take, where they were chosen; None for
            a run that resumes.
        target: Where the result is to run, where the user says it.
    """

    teacher: Captured
    scheme: Scheme
    recipe: Recipe
    source: Source
    preprocessing: Preprocessing
    size: int | None = None
    given: GivenData | None = None
    test: GivenData | None = None
    candidates: Candidates | None = None
    weights_sha256: str = ""
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    budget: float | None = None
    planned_seconds: float | None = None
    target: Target | None = None

    @property
    def effort(self) -> Effort:
        """Images, iterations and steps. Given as options they repeat a run with a budget."""
        return self.recipe.effort

    def with_effort(self, effort: Effort) -> "Plan":
        """Return this plan with other images, iterations and steps."""
        recipe = self.recipe.with_effort(effort)
        source = _source(recipe, self.given, self.preprocessing, self.candidates)
        return replace(self, recipe=recipe, source=source)

    def card(self, scheme: Scheme, seed: int) -> Card:
        """The card of the network that this plan makes.

        Args:
            scheme: The scheme with the bits of all layers.
            seed: Seed of the run.
        """
        return Card(
            inputs=self.teacher.inputs,
            classes=self.teacher.classes,
            outputs=self.teacher.outputs,
            preprocessing=self.preprocessing,
            bits=scheme.bits,
            placement=scheme.placement,
            recipe=self.recipe.name,
            seed=seed,
            layer_bits=tuple(map(str, scheme.layer_bits)),
        )

    def as_values(self) -> dict[str, Any]:
        """The plan's settings as plain values, for the configuration file of a run."""
        return {
            "weights_sha256": self.weights_sha256,
            "input": _inputs_as_values(self.teacher),
            "output": describe(self.teacher, self.teacher.ends),
            "normalisation": as_values(self.preprocessing),
            "bits": str(self.scheme.bits) if self.size is None else "auto",
            "size": self.size,
            "placement": self.scheme.placement,
            "layer_bits": list(map(str, self.scheme.layer_bits)),
            "recipe": as_values(self.recipe),
            "effort": self.effort.as_values(),
            "budget": self.budget,
            "target": None if self.target is None else self.target.name,
        }


def resolve(
    model: Model,
    example_input: ExampleInputs | None = None,
    bits: str | Bits | None = None,
    recipe: str | Recipe = "fast",
    *,
    data: Data | None = None,
    test: Data | None = None,
    proxy: Data | Candidates | None = None,
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
        data: Real images instead of synthetic ones.
        test: Images to measure on.
        proxy: Images that have nothing to do with the network, to join the synthetic ones.
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
    method = resolve_method(bits, recipe, **_chosen(options, MethodOptions))
    network = resolve_network(model, example_input, **_chosen(options, NetworkOptions))
    return plan_of(
        network, method, data=data, test=test, proxy=proxy, context=context, timing=timing
    )


def resolve_method(
    bits: str | Bits | None = None,
    recipe: str | Recipe = "fast",
    *,
    size: int | None = None,
    placement: str | None = None,
    layer_bits: Sequence[str] = (),
    steps: int | None = None,
    images: int | None = None,
    iterations: int | None = None,
    batch: int | None = None,
    budget: str | float | None = None,
    target: str | Target | None = None,
) -> Method:
    """Parse and check the options that need no network.

    Args:
        bits: Bits such as "w4a8", or "auto"; None for those of the placement (`DEFAULT_BITS`).
        recipe: A recipe, or its name.
        size: See `MethodOptions`, as for all that follow.
        placement: See `MethodOptions`.
        layer_bits: See `MethodOptions`.
        steps: See `MethodOptions`.
        images: See `MethodOptions`.
        iterations: See `MethodOptions`.
        batch: See `MethodOptions`.
        budget: See `MethodOptions`.
        target: See `MethodOptions`.

    Raises:
        UsageError: One of them cannot be used.
    """
    aim = None if target is None else named_target(target)
    if aim is not None:
        _check_target(aim, size)
    seconds = None if budget is None else seconds_of(budget)
    if seconds is not None:
        _check_budget(size=size, steps=steps, images=images, iterations=iterations)
    chosen = find_recipe(recipe)
    placed = parse_placement(placement or chosen.placement)
    overrides = tuple(map(LayerBits.parse, layer_bits))
    wanted = parse_bits(bits or DEFAULT_BITS[placed], size)
    if size is None:
        overrides = with_ends(overrides, wanted, placed)
    grids = GridRules() if aim is None else aim.grids
    scheme = Scheme(wanted, placed, overrides, grids)
    if steps is None and size is None:
        chosen = recipe_for(recipe, scheme)
    check_family(scheme, chosen.quantizers)
    chosen = chosen.with_steps(steps)
    # These refuse what cannot be used before a network is loaded.
    chosen.with_batch(batch).with_images(images, iterations)
    chosen = replace(chosen, placement=placed)
    return Method(scheme, chosen, size, batch, images, iterations, seconds, aim)


def _check_target(target: Target, size: int | None) -> None:
    """Raise UsageError for a target whose files cannot be proven here, or have no known size."""
    target.require_runtime()
    if size is not None and not target.takes_size:
        raise UsageError(
            "bits are chosen for the size of the file of target 'onnx'; the target is "
            f"{target.name!r}. Give the bits, as w4a8, or remove the target."
        )


def _check_budget(**others: int | None) -> None:
    """Raise UsageError for options that a budget chooses, or that it cannot be measured with."""
    given = [name for name, value in others.items() if value is not None]
    if "size" in given:
        raise UsageError(
            "a budget needs the bits: choosing them for a size takes a time that is not measured. "
            "Give the bits, as w4a8, or remove the budget."
        )
    if given:
        raise UsageError(
            f"a budget chooses images, iterations and steps; {', '.join(given)} was given, too. "
            "Give either."
        )


def resolve_network(
    model: Model,
    example_input: ExampleInputs | None = None,
    *,
    weights: str | Path | None = None,
    input_shape: tuple[int, ...] | None = None,
    mean: PerChannel | None = None,
    std: PerChannel | None = None,
    resize: Resize | None = None,
    classifier: bool | None = None,
    device: str = "auto",
) -> Network:
    """Load and capture a network.

    Args:
        model: The network: a name as the command line takes it, a module, or a captured network.
        example_input: Inputs of one call of a module, whose shapes the network keeps.
        weights: See `NetworkOptions`, as for all that follow.
        input_shape: See `NetworkOptions`.
        mean: See `NetworkOptions`.
        std: See `NetworkOptions`.
        resize: See `NetworkOptions`.
        classifier: See `NetworkOptions`.
        device: See `NetworkOptions`.

    Raises:
        UsageError: The network, its weights, its input or the device cannot be used.
    """
    started = time.perf_counter()
    on = find_device(device)
    normalisation(mean, std)  # refuses what can be no mean or std before a network is loaded
    if not isinstance(model, str | nn.Module | Captured):
        raise UsageError(
            "a model is an nn.Module, a network that gdfq.capture returned, or a name such as "
            f"timm:resnet18; got a {type(model).__name__}."
        )
    loaded = load_model(model, weights) if isinstance(model, str) else None
    loaded_at = time.perf_counter()
    if isinstance(model, Captured):
        captured, preprocessing = model, _preprocessing(model, mean, std, resize)
    elif isinstance(model, nn.Module):
        captured = capture(model, _example(example_input), classifier=classifier)
        preprocessing = _preprocessing(captured, mean, std, resize)
    else:
        assert loaded is not None
        shape, preprocessing = loaded.input(input_shape, mean, std)
        captured = capture(loaded.module, torch.zeros(1, *shape), classifier=classifier)
        preprocessing = replace(preprocessing, resize=resize or preprocessing.resize)
    assumed = _assumed(loaded, mean, std)
    if takes_images(captured.inputs) and not assumed:
        captured = replace(captured, input_limits=preprocessing.limits)
    return Network(
        captured.to(on),
        preprocessing,
        weights_hash(_module(model if loaded is None else loaded.module)),
        assumed,
        time.perf_counter() - started,
        names_of(_module(model)) if loaded is None else loaded.class_names,
        () if loaded is None else loaded.notes,
        time.perf_counter() - loaded_at,
    )


def plan_of(
    network: Network,
    method: Method,
    *,
    data: Data | None = None,
    test: Data | None = None,
    proxy: Data | Candidates | None = None,
    context: Context = Context(),
    timing: Timing = Timing(),
) -> Plan:
    """Fit a method to a network, read the images, and choose the effort for a budget.

    Args:
        network: The captured network.
        method: What is to be done.
        data: Real images instead of synthetic ones.
        test: Images to measure on.
        proxy: Images that have nothing to do with the network, to join the others.
        context: Context of the run, whose checkpoint may have the effort. Only a budget needs it.
        timing: What the time of the run consists of. Only a budget needs it.

    Raises:
        UsageError: The images cannot be used, or the budget is too small.
    """
    started = time.perf_counter() if timing.started is None else timing.started
    teacher, preprocessing = network.teacher, network.preprocessing
    recipe = method.recipe
    if takes_images(teacher.inputs):
        recipe = recipe.fitted(teacher.input_shape)
    elif data is None:
        image_shape(teacher.inputs)  # raises: sources make images alone
    recipe = recipe.with_batch(method.batch)
    if data is None:
        recipe = recipe.with_images(method.images, method.iterations)
    elif method.images is not None or method.iterations is not None:
        raise UsageError(
            "images and iterations are for synthetic images; real ones were given as data. Remove "
            "images and iterations, or data."
        )
    if proxy is not None:
        check_takes_candidates(method)
    names = network.class_names
    given = None if data is None else load_images(data, teacher, preprocessing, names)
    tested = None if test is None else load_test_images(test, teacher, preprocessing, names)
    candidates = None if proxy is None else load_candidates(proxy, teacher, preprocessing)
    source = _source(recipe, given, preprocessing, candidates)
    if given is None and not source.within_limits:
        teacher = replace(teacher, input_limits=None)  # the student would clip these images
    if method.target is not None:
        method.target.check_scheme(teacher, method.scheme)
    plan = Plan(
        _limited_by(teacher, given, tested, None if candidates is None else candidates.data),
        method.scheme,
        recipe,
        source,
        preprocessing,
        method.size,
        given,
        tested,
        candidates,
        network.weights_sha256,
        network.seconds,
        network.notes,
        method.budget,
        target=method.target,
    )
    if method.budget is None:
        return plan
    following = replace(timing.following, capture_seconds=network.capture_seconds)
    timing = replace(timing, started=started, following=following)
    return _within_budget(plan, method, context, timing)


_MEASURED_SHARE = 0.02
"""Share of a budget that further steps of each kind are measured for, after the first ones."""
_RECORD = "effort"
"""The part of a checkpoint that has the effort of a run with a budget."""


def _within_budget(plan: Plan, method: Method, context: Context, timing: Timing) -> Plan:
    """Return the plan with the effort of its budget: that of its checkpoint, or else a new one.

    A run that resumes takes the effort that it started with, and measures nothing.
    """
    assert plan.budget is not None
    assert timing.started is not None
    recorded = context.checkpointer.recorded(_RECORD)
    seconds: float | None = None
    if recorded is None:
        effort, seconds = _measured_effort(plan, plan.budget, method, context, timing)
    else:
        effort = _recorded_effort(recorded, plan.budget)
    record = Results(budget=plan.budget, **effort.as_values())
    context.checkpointer.register(_RECORD, record)
    return replace(plan.with_effort(effort), planned_seconds=seconds)


def _recorded_effort(recorded: Mapping[str, Any], budget: float) -> Effort:
    """Return the effort that a checkpoint has for a budget."""
    before = recorded.get("budget")
    if before != budget:
        raise UsageError(
            f"a run resumes with the settings that it started with; its budget was {before} s and "
            f"is {budget} s. Use the old budget, or start in another folder."
        )
    return Effort(recorded.get("images"), recorded.get("iterations"), recorded.get("steps", 0))


def _measured_effort(
    plan: Plan, budget: float, method: Method, context: Context, timing: Timing
) -> tuple[Effort, float]:
    """Return the effort that fits into a budget, and the seconds that it is expected to take.

    All processes measure at the same time, as they will work, and take the first one's numbers.
    """
    costs = measure_costs(
        plan.teacher,
        plan.scheme,
        replace(plan.recipe, source=plan.source),
        context,
        following=timing.following,
        least=_MEASURED_SHARE * budget,
    )
    passed = time.perf_counter() - (timing.started or 0.0)
    costs = costs.after(passed).agreed(context.group, plan.teacher.device)
    shape = plan.teacher.input_shape if takes_images(plan.teacher.inputs) else ()
    effort = effort_within(budget, costs, effort_rule(method.recipe, shape))
    return effort, costs.seconds(effort)


def _source(
    recipe: Recipe,
    given: GivenData | None,
    preprocessing: Preprocessing,
    candidates: Candidates | None = None,
) -> Source:
    """Return the recipe's source, or that of the given images, with candidates if there are any.

    At most as many candidates join as the recipe has images, so that they are at most half of those
    that the run makes.
    """
    source = recipe.source
    if given is not None:
        source = on_images(source, given, preprocessing)
    if candidates is None:
        return source
    return source.with_candidates(candidates, recipe.source.images_held)


def check_takes_candidates(method: Method) -> None:
    """Check that a method can use images without labels beside those of its source.

    Raises:
        UsageError: It learns labels, or has a budget, which does not count the screen.
    """
    if method.recipe.tuning.learns_labels:
        raise UsageError(
            "images from elsewhere have no labels but the teacher's predictions; recipe "
            f"{method.recipe.name!r} learns labels. Use a recipe that learns the teacher's outputs "
            "alone, such as fast, or remove the images."
        )
    if method.budget is not None:
        raise UsageError(
            "a budget does not count the time of judging images from elsewhere. Give images, "
            "iterations and steps instead of the budget, or remove the images."
        )


def load_candidates(
    proxy: Data | Candidates,
    teacher: Captured,
    preprocessing: Preprocessing,
    kind: str = "proxy",
) -> Candidates:
    """Read images that have nothing to do with a network.

    Args:
        proxy: The images, as a path or in memory; or candidates, which are taken as they are.
        teacher: The captured network.
        preprocessing: From pixels to its inputs.
        kind: What they are, for the user.

    Raises:
        UsageError: They cannot be used, or the network takes something else than images.
    """
    if isinstance(proxy, Candidates):
        return proxy
    images = load_unlabelled(proxy, image_shape(teacher.inputs), preprocessing.resize)
    return Candidates(images, preprocessing, kind)


def load_images(
    data: Data,
    teacher: Captured,
    preprocessing: Preprocessing,
    names: ClassNames | None = None,
) -> GivenData:
    """Read images for a network.

    Args:
        data: The images, as a path or in memory.
        teacher: The captured network.
        preprocessing: From pixels to its inputs.
        names: Names of the classes, which identify class folders.

    Raises:
        UsageError: They cannot be used.
    """
    return load_given(data, teacher.inputs, teacher.classes, preprocessing, names)


def load_test_images(
    data: Data,
    teacher: Captured,
    preprocessing: Preprocessing,
    names: ClassNames | None = None,
) -> GivenData:
    """Read test images for a network.

    Args:
        data: The images, as a path or in memory; with labels for a classifier.
        teacher: The captured network.
        preprocessing: From pixels to its inputs.
        names: Names of the classes, which identify class folders.

    Raises:
        UsageError: They cannot be used, or lack the labels that a classifier needs.
    """
    images = load_images(data, teacher, preprocessing, names)
    if images.labels is None and teacher.classes is not None:
        raise UsageError(f"test images need labels; these have none. {how_labelled(images)}")
    return images


def _limited_by(teacher: Captured, *images: GivenData | None) -> Captured:
    """The teacher, without input limits if images are given that exceed them.

    They are given as floats, and were normalised in another way, for instance each by itself.
    """
    if teacher.input_limits is None or all(
        data is None or isinstance(data, TensorData) or _within(data, teacher.input_limits)
        for data in images
    ):
        return teacher
    return replace(teacher, input_limits=None)


_LIMITS_CHECKED = 64
"""Images of which it is checked whether they are within the limits of pixels."""
_LIMITS_SLACK = 0.01
"""By so much images may exceed them: an interpolation overshoots."""


def _within(data: ImageData, limits: Sequence[tuple[float, float]]) -> bool:
    """Whether images are pixels, or floats [N, C, *] that pixels could be normalised to."""
    chosen = torch.arange(0, len(data), -(-len(data) // _LIMITS_CHECKED))
    if not data.images(chosen[:1]).is_floating_point():
        return True
    by_channel = data.images(chosen).transpose(0, 1).flatten(1)
    low, high = torch.tensor(limits).T
    slack = _LIMITS_SLACK * (high - low)
    return bool(
        (by_channel.amin(1) >= low - slack).all() and (by_channel.amax(1) <= high + slack).all()
    )


def _preprocessing(
    teacher: Captured,
    mean: PerChannel | None,
    std: PerChannel | None,
    resize: Resize | None,
) -> Preprocessing:
    """From pixels to the inputs of a network; other inputs are given as the network takes them."""
    if takes_images(teacher.inputs):
        return Preprocessing.of(teacher.input_shape[0], mean, std, resize)
    if not (mean is None and std is None and resize is None):
        image_shape(teacher.inputs)  # raises: these are for images
    return Preprocessing.of(1, None, None)


def _inputs_as_values(teacher: Captured) -> Any:
    """The shape of one image, or the inputs by name."""
    if takes_images(teacher.inputs):
        return list(teacher.input_shape)
    return {
        spec.name: {"shape": list(spec.shape), "dtype": str(spec.dtype).removeprefix("torch.")}
        for spec in teacher.inputs
    }


def _module(model: Model) -> nn.Module:
    """The module that holds the weights of a network."""
    assert not isinstance(model, str)
    return model.network if isinstance(model, Captured) else unwrapped(model)


def _example(example_input: ExampleInputs | None) -> ExampleInputs:
    if example_input is None:
        raise UsageError(
            "a network that is a module needs an example input, to be captured with; none was "
            "given. Give example_input, for instance torch.zeros(1, 3, 224, 224), or a tensor for "
            "each input by name."
        )
    return example_input


def _assumed(
    loaded: Loaded | None, mean: PerChannel | None, std: PerChannel | None
) -> tuple[str, ...]:
    """Parts of the normalisation that neither the user nor the network's library says."""
    if loaded is not None and loaded.preprocessing is not None:
        return ()
    return tuple(name for name, value in (("mean", mean), ("std", std)) if value is None)


def _chosen(options: PlanOptions, kind: type) -> Any:
    """The options of one kind."""
    return {name: value for name, value in options.items() if name in kind.__annotations__}
