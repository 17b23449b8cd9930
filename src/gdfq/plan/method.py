"""What is to be done, before it is fitted to a network."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Unpack

from gdfq.analysis.bit_allocation import parse_bits
from gdfq.deploy.export import named_target
from gdfq.deploy.target import Target
from gdfq.diffusion.sampler import Sampler
from gdfq.diffusion.weights import MinSnr
from gdfq.equalizers.named import find_equalizer
from gdfq.errors import UsageError
from gdfq.execution.budget import bytes_of
from gdfq.execution.durations import seconds_of
from gdfq.functional.grid import Bits
from gdfq.plan.options import DEFAULT_BITS, EffortOptions, MethodOptions, options_of
from gdfq.recipes import Recipe, find_recipe, recipe_for, with_code_rate
from gdfq.sources.trajectories import TrajectorySource
from gdfq.student.assignment import check_family
from gdfq.student.scheme import (
    GridRules,
    LayerBits,
    Scheme,
    parse_placement,
    with_default_layer_bits,
)


@dataclass(frozen=True)
class EffortRequest:
    """How much work the user asks for; None leaves it to the recipe.

    Attributes:
        steps: Batches in total; 0 without tuning.
        images: Images that are made before the student learns.
        iterations: Updates of each of these images.
        batch: Images in a batch.
        budget: Seconds of the whole run, where images, iterations and steps are chosen for them.
    """

    steps: int | None = None
    images: int | None = None
    iterations: int | None = None
    batch: int | None = None
    budget: float | None = None

    @classmethod
    def of(cls, **options: Unpack[EffortOptions]) -> "EffortRequest":
        """Parse the options.

        Raises:
            UsageError: The budget is no time, or what it chooses was given, too.
        """
        budget = options.get("budget")
        asked = cls(
            options.get("steps"),
            options.get("images"),
            options.get("iterations"),
            options.get("batch"),
            None if budget is None else seconds_of(budget),
        )
        if asked.budget is not None:
            _refuse_chosen(steps=asked.steps, images=asked.images, iterations=asked.iterations)
        return asked

    def of_images(self, recipe: Recipe) -> Recipe:
        """Return a recipe with the images of this request.

        Raises:
            UsageError: It cannot have them.
        """
        return recipe.with_batch(self.batch).with_images(self.images, self.iterations)

    def of_given(self, recipe: Recipe) -> Recipe:
        """Return a recipe for given images, of which there is no number to choose.

        Raises:
            UsageError: A number of images or of iterations is asked for.
        """
        if self.images is not None or self.iterations is not None:
            raise UsageError(
                "images and iterations are for synthetic images; real ones were given as data. "
                "Remove images and iterations, or data."
            )
        return recipe.with_batch(self.batch)

    def of_trajectories(self, recipe: Recipe, sampler: Sampler) -> Recipe:
        """Return a recipe for the trajectories of a denoiser, instead of images.

        Raises:
            UsageError: A number of iterations, or a budget, is asked for.
        """
        for name in ("iterations", "budget"):
            if getattr(self, name) is not None:
                raise UsageError(
                    f"{name} is for images that are optimised; a denoiser is quantized on its own "
                    f"trajectories. Remove {name}; images and steps say how much work the run does."
                )
        chosen = self.of_images(recipe.fitted(sampler.shape))
        trajectories = TrajectorySource(sampler, chosen.source.batch)
        return replace(
            chosen,
            source=chosen.source.on(trajectories, chosen.source.images_held),
            tuning=chosen.tuning.weighted_by_time(MinSnr(sampler.scheduler)),
        )


@dataclass(frozen=True)
class Method:
    """What is to be done, before it is fitted to a network.

    Attributes:
        scheme: What is quantized, to how many bits.
        recipe: The recipe, with its placement and steps.
        size: The size of the ONNX file in bytes, where bits are to be chosen for it.
        effort: How much work the user asks for.
        target: Where the result is to run, where the user says it.
        equalizer_said: Whether the user says the equalizer.
        untuned: The recipe for a budget that is too short to tune; None without a budget.
    """

    scheme: Scheme
    recipe: Recipe
    size: int | None = None
    effort: EffortRequest = EffortRequest()
    target: Target | None = None
    equalizer_said: bool = False
    untuned: Recipe | None = None


def resolve_method(
    bits: str | Bits | None = None,
    recipe: str | Recipe = "fast",
    **options: Unpack[MethodOptions],
) -> Method:
    """Parse and check the options that need no network.

    Args:
        bits: Bits such as "w4a8", or "auto"; None for those of the placement (`DEFAULT_BITS`).
        recipe: A recipe, or its name.
        **options: See `MethodOptions`.

    Raises:
        UsageError: One of them cannot be used.
    """
    target = options.get("target")
    size = bytes_of(
        options.get("size"),
        "size must be a whole number of bytes, at least 1, or a text such as 300KB or 1.5MiB",
    )
    aim = None if target is None else named_target(target)
    if aim is not None:
        _check_target(aim, size)
    effort = EffortRequest.of(**options_of(options, EffortOptions))
    if effort.budget is not None and size is not None:
        raise UsageError(
            "a budget needs the bits: choosing them for a size takes a time that is not measured. "
            "Give the bits, as w4a8, or remove the budget."
        )
    chosen = find_recipe(recipe)
    placed = parse_placement(options.get("placement") or chosen.placement)
    overrides = _layer_bits(options.get("layer_bits", ()))
    wanted = parse_bits(bits or DEFAULT_BITS[placed], size)
    if size is None:
        overrides = with_default_layer_bits(overrides, wanted, placed)
    grids = GridRules() if aim is None else aim.grids
    scheme = Scheme(
        wanted,
        placed,
        overrides,
        grids,
        group_size=options.get("group_size"),
        new_biases=aim is None or not aim.holds_weights_alone,
    )
    if not effort.steps and size is None:
        chosen = recipe_for(recipe, scheme, tuned=effort.steps != 0)
    if size is None and not isinstance(recipe, Recipe):
        chosen = with_code_rate(chosen, scheme)
    check_family(scheme, chosen.quantizers)
    equalizer = options.get("equalizer")
    if equalizer is not None:
        if placed != "tokens":
            raise UsageError("an equalizer is for language models, with recipe 'text'. Remove it.")
        chosen = replace(chosen, equalizer=find_equalizer(equalizer))
    untuned = None
    if effort.budget is not None:
        untuned = replace(recipe_for(recipe, scheme, tuned=False), placement=placed)
    chosen = chosen.with_steps(effort.steps)
    effort.of_images(chosen)  # refuses what cannot be used before a network is loaded
    return Method(
        scheme,
        replace(chosen, placement=placed),
        size,
        effort,
        aim,
        equalizer_said=equalizer is not None,
        untuned=untuned,
    )


def _layer_bits(texts: Sequence[str]) -> tuple[LayerBits, ...]:
    """Parse the bits of layers. Raise UsageError for one text in the place of a list."""
    if isinstance(texts, str):
        raise UsageError(
            f'layer_bits must be a list of texts; got the text {texts!r}. Give a list: ["{texts}"].'
        )
    return tuple(map(LayerBits.parse, texts))


def _check_target(target: Target, size: int | None) -> None:
    """Raise UsageError for a target whose files cannot be proven here, or have no known size."""
    target.require_runtime()
    if size is not None and not target.takes_size:
        raise UsageError(
            "bits are chosen for the size of the file of target 'onnx'; the target is "
            f"{target.name!r}. Give the bits, as w4a8, or remove the target."
        )


def _refuse_chosen(**others: int | None) -> None:
    """Raise UsageError for options that a budget chooses."""
    given = [name for name, value in others.items() if value is not None]
    if given:
        verb, them = ("was", "it") if len(given) == 1 else ("were", "them")
        raise UsageError(
            f"a budget chooses images, iterations and steps; {', '.join(given)} {verb} given, too. "
            f"Remove {them} or the budget."
        )
