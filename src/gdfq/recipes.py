"""Recipes: source, quantizers, losses with their weights, and number of steps.

A recipe is a frozen value. A new method is a new value that combines parts of this package or your
own (docs/extend.md).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from gdfq.effort import Effort, EffortRule
from gdfq.equalizers.base import Equalizer
from gdfq.equalizers.hadamard import Hadamard
from gdfq.errors import UsageError
from gdfq.files.plain_values import tagged
from gdfq.functional.grid import MAX_BITS, UNSATURATED_BITS
from gdfq.optim import AdamConfig, Cosine, SgdConfig
from gdfq.quantizers.family import ADAROUND, LSQ, MINMAX, TOKENS, QuantizerFamily
from gdfq.sources.base import Source
from gdfq.sources.generator import GeneratorSource
from gdfq.sources.given import GivenImages
from gdfq.sources.latent import LatentSource
from gdfq.sources.own_text import OwnText
from gdfq.sources.patches import PatchSource
from gdfq.sources.pixels import OptimisedSource
from gdfq.sources.pool import ImagePool
from gdfq.sources.spectral import SpectralSource
from gdfq.student.scheme import Placement, Scheme
from gdfq.tuning.base import NO_TUNING, Tuning
from gdfq.tuning.distill import Distillation
from gdfq.tuning.grid_adam import GridAdam
from gdfq.tuning.reconstruct import Reconstruction


@tagged(
    "Recipe",
    spellings={"relu": "t1"},
    ignored=("summary",),
    added={"fit_weights": False, "equalizer": None},
)
@dataclass(frozen=True)
class Recipe:
    """A complete method. A step is a batch that is taken from the source.

    Attributes:
        name: Name of the recipe.
        summary: Description in one line.
        source: Supplies the images.
        steps: Total number of steps.
        calibration: Number of first steps that set the activation ranges.
        warmup: Number of first steps that do not update the student; a generator learns in them.
        tuning: Trains the student in the other steps. With `NO_TUNING` all steps calibrate.
        placement: Where activations are quantized, by default (`gdfq.student.scheme.Scheme`).
        quantizers: Family of the quantizers.
        match_moments: Whether the outputs of each layer get the teacher's mean and standard
            deviation after calibration (`gdfq.tuning.moment_matching`).
        fit_weights: Whether weights are fitted to the teacher's outputs then, and rounded so that
            later codes compensate the rounding of earlier ones (`gdfq.tuning.weight_fitting`).
        equalizer: Changes a language model before its student is built; the function stays.

    Raises:
        UsageError: The parts are incompatible.
    """

    name: str
    summary: str
    source: Source
    steps: int
    calibration: int
    warmup: int
    tuning: Tuning
    placement: Placement
    quantizers: QuantizerFamily = MINMAX
    match_moments: bool = False
    fit_weights: bool = False
    equalizer: Equalizer | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.calibration <= self.warmup <= self.steps:
            raise UsageError(
                "a recipe needs 1 <= calibration <= warmup <= steps; "
                f"got {self.calibration}, {self.warmup}, {self.steps}."
            )
        family, tuning = self.quantizers, self.tuning
        if not isinstance(family, QuantizerFamily):
            raise UsageError(
                "quantizers must be a QuantizerFamily, such as MINMAX, LSQ or ADAROUND; "
                f"got {family!r}."
            )
        updates = self.steps - self.warmup
        if tuning.learns_rounding != family.learns_rounding or (
            tuning.learns_rounding and not updates
        ):
            raise UsageError(
                "rounding is learned by reconstruction, in at least one step after the warm-up; "
                f"recipe {self.name!r} has quantizers {family.name!r}, tuning by "
                f"{type(tuning).__name__}, and {updates} such steps."
            )
        if family.folds and not tuning.fixed_statistics:
            raise UsageError(
                "learned quantizers fold the batch norms, so their statistics must be fixed; "
                f"recipe {self.name!r} updates them. Set fixed_statistics to True."
            )
        if tuning.needs_folded_batch_norms and not family.folds:
            raise UsageError(
                "block features are matched where batch norms are folded, which students with "
                f"learned quantizers have; recipe {self.name!r} has {family.name!r}. "
                "Set features to 0 or quantizers to LSQ."
            )
        if self.fit_weights and not self.match_moments and family.tokens is None:
            raise UsageError(
                "weights are fitted where moments are matched; "
                f"recipe {self.name!r} has match_moments=False. Set it to True."
            )
        if self.match_moments and not family.rescales:
            raise UsageError(
                "moments are matched by learned weights; "
                f"recipe {self.name!r} has {family.name!r}. Set quantizers to LSQ."
            )

    @property
    def effort(self) -> Effort:
        """Images, iterations and steps."""
        made = self.source.images_made
        return Effort(made or None, self.source.iterations if made else None, self.steps)

    @property
    def effort_in_words(self) -> str:
        """Images and steps in words, such as "256 images of 24 iterations, 80 steps"."""
        if self.tuning.trains:
            return str(self.effort)
        images = self.effort.images_in_words
        return f"{images}, calibrated without tuning" if images else "calibrated without tuning"

    def with_effort(self, effort: Effort) -> "Recipe":
        """Return this recipe with other images, iterations and steps.

        Raises:
            UsageError: The recipe does not take them.
        """
        return self.with_images(effort.images, effort.iterations).with_steps(effort.steps)

    def with_images(self, images: int | None, iterations: int | None = None) -> "Recipe":
        """Return this recipe with other images. Without tuning, all of them calibrate.

        Args:
            images: Images that are made before the student learns; None changes nothing.
            iterations: Updates of each image; None changes nothing.

        Raises:
            UsageError: They are not positive whole numbers, or the recipe makes its images while
                the student learns.
        """
        _check_counts(images=images, iterations=iterations)
        source, once = self.source, not self.tuning.trains
        source = source if images is None else source.with_images(images, once=once)
        source = source if iterations is None else source.with_iterations(iterations)
        recipe = replace(self, source=source)
        if images is None or self.tuning.trains:
            return recipe
        return recipe.with_steps(max(1, images // source.batch))

    def with_steps(self, steps: int | None) -> "Recipe":
        """Return this recipe shortened or lengthened to `steps`.

        Milestones of the learning rate are fractions of the run and scale with it. Calibration and
        warm-up keep min(their steps, steps / 4), because ranges that are frozen on a generator that
        has not learned are noise.

        Args:
            steps: Total number of steps; None changes nothing. 0 is a run that does not tune: all
                images calibrate, and weights are fitted to them if the recipe fits weights.

        Raises:
            UsageError: There are too few steps, or the recipe needs to tune.
        """
        _check_counts(0, steps=steps)
        if steps is None:
            return self
        if steps == 0:
            return self._untuned()
        if not self.tuning.trains:
            return replace(self, steps=steps, calibration=steps, warmup=steps)
        if steps < 4:
            otherwise = "" if self._reason_to_tune else ", or 0 for no tuning"
            raise UsageError(
                f"recipe {self.name!r} calibrates in a quarter of its steps and so needs at "
                f"least 4{otherwise}; got {steps}."
            )
        quarter = steps // 4
        return replace(
            self,
            steps=steps,
            calibration=min(self.calibration, quarter),
            warmup=min(self.warmup, quarter),
        )

    @property
    def _reason_to_tune(self) -> str:
        """Why this recipe cannot do without tuning; empty if it can."""
        if self.tuning.learns_rounding:
            return "learns its rounding"
        return "" if self.source.images_held else "draws its images"

    def _untuned(self) -> "Recipe":
        """Return this recipe without its tuning."""
        if not self.tuning.trains:
            return self
        if why := self._reason_to_tune:
            raise UsageError(
                f"recipe {self.name!r} {why} while it tunes, so it needs at least 4 steps; got 0."
            )
        steps = self.calibration
        recipe = replace(self, tuning=NO_TUNING, steps=steps, warmup=steps)
        return recipe.with_images(self.source.images_made or None)

    def with_batch(self, batch: int | None) -> "Recipe":
        """Return this recipe with `batch` images per step, for tuning and for making images.

        Args:
            batch: Images per batch; None changes nothing.

        Raises:
            UsageError: `batch` is not a positive whole number.
        """
        _check_counts(batch=batch)
        if batch is None:
            return self
        return replace(self, source=self.source.with_batch(batch))

    def fitted(self, input_shape: Sequence[int]) -> "Recipe":
        """Return this recipe with as many images, and images per step, as the inputs allow."""
        return replace(self, source=self.source.fitted(input_shape))


def _check_counts(least: int = 1, /, **counts: int | None) -> None:
    """Raise UsageError for a count that is no whole number of at least `least`; None is none."""
    for name, count in counts.items():
        if count is not None and (
            not isinstance(count, int) or isinstance(count, bool) or count < least
        ):
            raise UsageError(f"{name} must be a whole number of at least {least}; got {count}.")


_MAX_POOL_PIXELS = 2**26
"""Maximum pixels of all images of a pool together: 0.8 GB of float32 in three channels."""

_FAST_POOL = ImagePool(SpectralSource(), images=4096, batch=64, pixels=_MAX_POOL_PIXELS)

_RATES = GridAdam(code_lr=0.01, scale_lr=1e-3, other_lr=5e-4)

_FAST_TUNING = Distillation(
    _RATES,
    schedule=Cosine(),
    cross_entropy=0.0,
    temperature=4.0,
    reduction="batch",
    features=1.0,
)

FAST = Recipe(
    name="fast",
    summary="as quick at w4a8 and above; below: also tuned on a pool of images, for minutes",
    source=_FAST_POOL,
    steps=800,
    calibration=10,
    warmup=10,
    tuning=_FAST_TUNING,
    placement="full",
    quantizers=LSQ,
    match_moments=True,
    fit_weights=True,
)

_QUICK_TUNING = replace(_FAST_TUNING, schedule=Cosine(warmup=0.1))

QUICK = replace(
    FAST,
    name="quick",
    summary="weights fitted to few images; below 4 bits also tuned: seconds to minutes",
    source=ImagePool(SpectralSource(), images=256, batch=100, pixels=_MAX_POOL_PIXELS),
    steps=80,
    calibration=3,
    warmup=3,
    tuning=_QUICK_TUNING,
)

PATCHES = replace(
    FAST,
    name="patches",
    summary="fast on images of diverse patches: for networks without batch norms (transformers)",
    source=ImagePool(PatchSource(), images=1024, batch=100, pixels=_MAX_POOL_PIXELS),
    steps=1500,
    calibration=3,
    warmup=3,
    match_moments=False,
    fit_weights=False,
)

GENIE = Recipe(
    name="genie",
    summary="GENIE: optimised latents, learned rounding block by block",
    source=ImagePool(LatentSource(), images=512, batch=128, augmented=False),
    steps=700,
    calibration=1,
    warmup=1,
    tuning=Reconstruction(
        GridAdam(code_lr=0.0, scale_lr=1e-3, other_lr=0.0, rounding_lr=0.02), images=512
    ),
    placement="relu",
    quantizers=ADAROUND,
)

SYNQ = Recipe(
    name="synq",
    summary="SynQ without its activation maps: focal, low-passed images; easy hard labels",
    source=ImagePool(
        OptimisedSource(
            batch=128, iterations=100, optimizer=AdamConfig(lr=0.1), class_weight=1.0, cutoff=20.0
        ),
        images=512,
        batch=100,
    ),
    steps=700,
    calibration=4,
    warmup=4,
    tuning=Distillation(
        SgdConfig(lr=1e-3), schedule=Cosine(), cross_entropy=0.5, difficulty=0.5, reduction="batch"
    ),
    placement="relu",
)

_STEPS_PER_EPOCH = 200  # iterations, in all published schedules

_GENERATOR = GeneratorSource(batch=200)
_DISTILLATION = Distillation(SgdConfig(lr=1e-4))

PAPER = Recipe(
    name="paper",
    summary="GDFQ as published for CIFAR",
    source=_GENERATOR,
    steps=400 * _STEPS_PER_EPOCH,
    calibration=4 * _STEPS_PER_EPOCH,
    warmup=4 * _STEPS_PER_EPOCH,
    tuning=_DISTILLATION,
    placement="relu",
)

PAPER_IMAGENET = replace(
    PAPER,
    name="paper-imagenet",
    summary="GDFQ as published for ImageNet",
    source=GeneratorSource(batch=16, conditioning="conditional-batch-norm"),
    warmup=50 * _STEPS_PER_EPOCH,
    tuning=Distillation(SgdConfig(lr=1e-6)),
)

_ABLATIONS = (
    replace(
        PAPER,
        name="paper-no-boundary",
        summary="paper without the class-boundary loss",
        source=replace(_GENERATOR, class_boundary=0.0),
    ),
    replace(
        PAPER,
        name="paper-no-statistics",
        summary="paper without the batch-norm statistics loss",
        source=replace(_GENERATOR, statistics=0.0),
    ),
    replace(
        PAPER,
        name="paper-untrained",
        summary="paper with neither generator loss",
        source=replace(_GENERATOR, class_boundary=0.0, statistics=0.0),
    ),
    replace(
        PAPER,
        name="paper-moving-statistics",
        summary="paper without fixed batch-norm statistics",
        tuning=replace(_DISTILLATION, fixed_statistics=False),
    ),
    replace(
        PAPER,
        name="paper-no-distillation",
        summary="paper without the distillation loss",
        tuning=replace(_DISTILLATION, distillation=0.0),
    ),
    replace(
        PAPER,
        name="paper-separate",
        summary="paper with the generator trained first, then fixed",
        source=replace(_GENERATOR, head_start=1.0, stop=0.0),
    ),
    replace(
        PAPER,
        name="paper-early-stop",
        summary="paper with the generator stopped after a quarter of the steps",
        source=replace(_GENERATOR, stop=0.25),
    ),
    replace(
        PAPER,
        name="paper-standard-kl",
        summary="paper with the KL averaged over the batch alone (C times stronger)",
        tuning=replace(_DISTILLATION, reduction="batch"),
    ),
)

REAL = replace(
    FAST,
    name="real",
    summary="fast's tuning on real images (--data)",
    source=replace(_FAST_POOL, source=GivenImages(batch=_FAST_POOL.batch)),
)

_BASELINES = (
    replace(
        PAPER,
        name="round",
        summary="direct rounding; ranges from generated images, no training",
        steps=PAPER.calibration,
        tuning=NO_TUNING,
    ),
    Recipe(
        name="zeroq",
        summary="direct rounding; ranges from optimised images (ZeroQ)",
        source=OptimisedSource(),
        steps=1,
        calibration=1,
        warmup=1,
        tuning=NO_TUNING,
        placement="relu",
    ),
    REAL,
    replace(
        PAPER,
        name="paper-real",
        summary="paper's tuning on real images (--data)",
        source=GivenImages(batch=PAPER.source.batch),
    ),
)

TEXT = Recipe(
    name="text",
    summary="for causal language models: as text-quick, then tuned on the text",
    source=OwnText(),
    steps=168,
    calibration=8,
    warmup=8,
    tuning=Distillation(
        GridAdam(code_lr=0.01, scale_lr=1e-3, other_lr=5e-4),
        schedule=Cosine(),
        cross_entropy=0.0,
        temperature=1.0,
        reduction="batch",
    ),
    placement="tokens",
    quantizers=TOKENS,
    fit_weights=True,
    equalizer=Hadamard(),
)

TEXT_QUICK = replace(
    TEXT,
    name="text-quick",
    summary="for causal language models: rotated, weights fitted to text that they write",
    steps=TEXT.calibration,
    tuning=NO_TUNING,
)

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        FAST,
        QUICK,
        PATCHES,
        GENIE,
        SYNQ,
        TEXT,
        TEXT_QUICK,
        PAPER,
        PAPER_IMAGENET,
        *_ABLATIONS,
        *_BASELINES,
    )
}


_FITTED_PIXELS = 256 * 224 * 224
"""Pixels of all images together that weights are fitted to: 256 images of 224x224."""
_FITTED = replace(
    FAST,
    source=ImagePool(SpectralSource(), images=512, batch=128, pixels=_FITTED_PIXELS),
    steps=4,
    calibration=4,
    warmup=4,
    tuning=NO_TUNING,
)
_CALIBRATED = _FITTED.with_images(128, 10).with_batch(128)
_EFFORT_BY_BITS = frozenset({FAST.name, QUICK.name})
"""Recipes by name whose effort follows the bits."""
_FITTED_BITS = 4
"""Fewest bits of weights and activations from which quick fits weights and does not tune, and of
weights from which fast does not, where activations have 7 bits or more: tuning on made images gains
nothing there, or loses."""
_FINE_BITS = 4
_FINE_RATES = replace(_RATES, code_lr=_RATES.code_lr / 4)
"""Fewest bits of fitted weights whose latent codes learn slowly, and the rates then. Such codes
round so well that the first updates, which move each by the rate, undo more than others gain."""
_FINE_TUNINGS = {
    name: replace(tuning, optimizer=_FINE_RATES)
    for name, tuning in (
        (FAST.name, _FAST_TUNING),
        (QUICK.name, _QUICK_TUNING),
        (REAL.name, _FAST_TUNING),
    )
}
"""The tuning of fitted weights of so many bits, by the name of the recipe."""


def recipe_for(recipe: str | Recipe, scheme: Scheme, *, tuned: bool = True) -> Recipe:
    """Return a recipe by its name, with the effort that the bits need, or the recipe itself.

    Where all weights and activations have 7 bits or more, fast and quick make few images and do not
    tune, because it changes nothing; for the same reason text does not tune where all have 8.
    With 4 bits and more quick does not tune either, and fast does not where all activations have 7
    bits or more.

    Args:
        recipe: A recipe, or its name.
        scheme: Bits of all layers.
        tuned: Whether fast tunes where it gains by it.

    Raises:
        UsageError: There is no such name.
    """
    if isinstance(recipe, Recipe):
        return recipe
    overrides = [layer.bits for layer in scheme.layer_bits if layer.bits is not None]
    activations = min(scheme.bits.activations, *overrides, MAX_BITS)
    fewest = min(scheme.bits.weights, activations)
    if recipe == TEXT.name and fewest == MAX_BITS:
        return _as_variant_of(recipe, TEXT_QUICK)
    if recipe in _EFFORT_BY_BITS and fewest >= UNSATURATED_BITS:
        return _as_variant_of(recipe, _CALIBRATED)
    gains_by_tuning = tuned and recipe == FAST.name and activations < UNSATURATED_BITS
    if recipe in _EFFORT_BY_BITS and fewest >= _FITTED_BITS and not gains_by_tuning:
        return _as_variant_of(recipe, _FITTED)
    return find_recipe(recipe)


def _as_variant_of(name: str, recipe: Recipe) -> Recipe:
    """Return a recipe under the name of the one that it stands for, with the summary of that."""
    return replace(recipe, name=name, summary=RECIPES[name].summary)


def with_code_rate(recipe: Recipe, scheme: Scheme) -> Recipe:
    """Return a recipe of this module whose weights learn at the rate that their bits need.

    Where no weights have fewer than 4 bits, the rate of fitted codes is a quarter of the usual one.
    """
    bits = [layer.bits for layer in scheme.layer_bits if layer.bits is not None]
    tuning = _FINE_TUNINGS.get(recipe.name)
    if tuning is None or not recipe.tuning.trains:
        return recipe
    return (
        recipe if min([scheme.bits.weights, *bits]) < _FINE_BITS else replace(recipe, tuning=tuning)
    )


def find_recipe(recipe: str | Recipe) -> Recipe:
    """Return a recipe by its name, or the recipe itself.

    Raises:
        UsageError: There is no such name.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if recipe not in RECIPES:
        raise UsageError(f"there is no recipe {recipe!r}. Choose one of: {', '.join(RECIPES)}.")
    return RECIPES[recipe]


EFFORT_RULE = EffortRule()
"""How a time budget is divided by recipes whose images need few iterations (fast, quick)."""
_TUNED_RULE = replace(EFFORT_RULE, max_images=_FAST_POOL.images, max_views=20)
"""The same where they tune. More views of an image gain nothing, and many lose: MobileNetV1 at w4a4
has a KL of 0.59 to 0.64 with 7 to 30 views, of 0.65 and 0.68 with 60 and 83."""
_FINE_RULE = replace(_TUNED_RULE, tuned_images=512, tuned_steps=80, untuned_images=512)
"""The same where the weights that are tuned are fitted well. A short tuning undoes a part of the
fit: MobileNetV1 at w4a4 has a KL of 0.84 after 110 steps on 192 images, of 0.77 fitted to 256."""


def effort_rule(recipe: Recipe, input_shape: Sequence[int]) -> EffortRule:
    """Return how a recipe divides a time budget.

    Other sources than that of fast and quick keep their own number of iterations. A pool limits the
    images of large inputs.

    Args:
        recipe: The recipe, not yet fitted to the input.
        input_shape: Shape of one input, [C, *size].
    """
    iterations = recipe.source.iterations
    if iterations is None or not recipe.source.images_held:
        return EFFORT_RULE
    rule = EFFORT_RULE.with_iterations(iterations)
    if recipe.name in _EFFORT_BY_BITS:
        rule = _TUNED_RULE if recipe.tuning.trains else EFFORT_RULE
        rule = _FINE_RULE if recipe.tuning in _FINE_TUNINGS.values() else rule
        fitted = _FITTED.with_images(rule.max_images).fitted(input_shape).source.images_held
        rule = replace(rule, untuned_images=min(rule.untuned_images, fitted))
    most = recipe.source.with_images(rule.max_images).fitted(input_shape).images_held
    return rule.limited(most)
