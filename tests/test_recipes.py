"""Recipes: published values, schedules and what may be combined."""

from dataclasses import replace
from typing import Any

import pytest
from support import networks
from support.narrowing import instance
from support.small_runs import small

import gdfq
from gdfq import RECIPES, UsageError
from gdfq.graph.capture import Captured
from gdfq.optim import SgdConfig
from gdfq.plan.method import resolve_method
from gdfq.plan.resolve import resolve
from gdfq.quantizers.family import MINMAX
from gdfq.recipes import FAST, GENIE, PAPER, Recipe, find_recipe
from gdfq.sources.generator import GeneratorSource
from gdfq.sources.pool import ImagePool
from gdfq.tuning.distill import Distillation
from gdfq.tuning.grid_adam import GridAdam


def test_with_steps_scales_the_published_schedule() -> None:
    assert (PAPER.steps, PAPER.calibration, PAPER.warmup) == (80_000, 800, 800)
    imagenet = RECIPES["paper-imagenet"]
    assert (imagenet.calibration, imagenet.warmup) == (800, 10_000)
    short = imagenet.with_steps(2000)
    assert (short.steps, short.calibration, short.warmup) == (2000, 500, 500)
    long = imagenet.with_steps(100_000)
    assert (long.calibration, long.warmup) == (800, 10_000)
    assert RECIPES["round"].with_steps(60).calibration == 60


def test_no_steps_calibrate_on_all_images_and_do_not_tune() -> None:
    recipe = FAST.with_images(256).with_steps(0)
    assert (recipe.steps, recipe.calibration, recipe.warmup, recipe.source.batch) == (4, 4, 4, 64)
    assert not recipe.tuning.trains
    assert recipe.fit_weights
    assert recipe.with_steps(0) is recipe
    for bits, name in (("w8a8", "fast"), ("w4a8", "fast"), ("w4a4", "quick")):
        untuned = resolve_method(bits, name)
        assert resolve_method(bits, name, steps=0).recipe == untuned.recipe
    assert resolve_method("w4a4", "text").recipe.tuning.trains
    text = resolve_method("w4a4", "text", steps=0).recipe
    assert replace(text, name="", summary="") == replace(RECIPES["text-quick"], name="", summary="")


@pytest.mark.parametrize(
    ("name", "why"), [("genie", "learns its rounding"), ("paper", "draws its images")]
)
def test_recipes_that_need_steps_refuse_none(name: str, why: str) -> None:
    with pytest.raises(UsageError, match=rf"{name!r} {why} while it tunes.* at least 4 steps"):
        RECIPES[name].with_steps(0)


@pytest.mark.parametrize(
    ("name", "least"),
    [("quick", "at least 4, or 0 for no tuning; got 2"), ("genie", "at least 4; got 2")],
)
def test_too_few_steps_are_refused_with_what_is_allowed(name: str, least: str) -> None:
    with pytest.raises(UsageError, match=least):
        RECIPES[name].with_steps(2)


def test_paper_has_the_published_values() -> None:
    generator = instance(PAPER.source, GeneratorSource)
    tuning, imagenet_tuning = (
        instance(RECIPES[name].tuning, Distillation) for name in ("paper", "paper-imagenet")
    )
    imagenet = instance(RECIPES["paper-imagenet"].source, GeneratorSource)
    assert (generator.batch, generator.latent, generator.statistics) == (200, 100, 0.1)
    assert (generator.optimizer.lr, generator.optimizer.betas) == (1e-3, (0.5, 0.999))
    assert (tuning.temperature, tuning.reduction, tuning.fixed_statistics) == (20, "element", True)
    assert instance(tuning.optimizer, SgdConfig).lr == 1e-4
    assert instance(imagenet_tuning.optimizer, SgdConfig).lr == 1e-6
    assert imagenet.batch == 16
    assert imagenet.conditioning == "conditional-batch-norm"


def test_with_batch_sets_the_batch(teacher: Captured, tiny: Recipe) -> None:
    recipe = small(RECIPES["fast"]).with_batch(4)
    assert (recipe.source.batch, instance(recipe.source, ImagePool).source.batch) == (4, 4)
    assert tiny.with_batch(3).source.batch == 3
    assert tiny.with_batch(None) is tiny
    with pytest.raises(gdfq.UsageError, match="at least 1; got 0"):
        tiny.with_batch(0)
    result = gdfq.quantize(teacher, networks.images(1), "w4a4", tiny, batch=5)
    assert len(result.examples[0]) == 5


def test_recipe_refuses_parts_that_do_not_fit() -> None:
    for change in ({"quantizers": MINMAX}, {"tuning": FAST.tuning}, {"warmup": 700}):
        with pytest.raises(UsageError, match="learned by reconstruction"):
            replace(GENIE, **change)
    with pytest.raises(UsageError, match="learned weights"):
        replace(GENIE, match_moments=True)


def test_feature_loss_needs_folded_batch_norms(tiny: Recipe) -> None:
    with pytest.raises(ValueError, match="learned"):
        replace(tiny, tuning=replace(instance(tiny.tuning, Distillation), features=1.0))


def test_learned_quantizers_need_fixed_statistics() -> None:
    with pytest.raises(ValueError, match="fixed_statistics"):
        replace(FAST, tuning=replace(instance(FAST.tuning, Distillation), fixed_statistics=False))
    with pytest.raises(ValueError, match="MINMAX, LSQ or ADAROUND"):
        replace(FAST, quantizers="learnt")  # type: ignore[arg-type]


def test_recipe_refuses_calibration_after_warmup(tiny: Recipe) -> None:
    with pytest.raises(ValueError, match="calibration <= warmup"):
        replace(tiny, calibration=5, warmup=2)


@pytest.mark.parametrize("bits", ["w8a8", "w7a8", "w8a7"])
@pytest.mark.parametrize("name", ["fast", "quick"])
def test_recipe_is_calibrated_without_tuning_where_all_has_7_bits_or_more(
    name: str, bits: str
) -> None:
    method = resolve_method(bits, name)
    assert not method.recipe.tuning.trains
    assert (method.recipe.steps, method.recipe.source.images_held) == (1, 128)
    assert method.recipe.effort_in_words == (
        "128 images of 10 iterations, calibrated without tuning"
    )


@pytest.mark.parametrize(
    ("bits", "options"),
    [("w3a8", {}), ("w8a3", {}), ("w8a8", {"steps": 8}), ("w8a8", {"layer_bits": ("last=3",)})],
)
def test_recipe_is_tuned_where_some_have_fewer_bits_or_steps_are_given(
    bits: str, options: dict[str, Any]
) -> None:
    recipe = resolve_method(bits, "quick", **options).recipe
    assert recipe.tuning.trains
    assert recipe.source == find_recipe("quick").source


@pytest.mark.parametrize("bits", ["w4a8", "w4a4", "w8a5"])
def test_quick_fits_weights_without_tuning_from_4_bits_on(bits: str) -> None:
    recipe = resolve_method(bits, "quick").recipe
    assert recipe.fit_weights
    assert recipe.effort_in_words == "512 images of 24 iterations, calibrated without tuning"
    assert recipe.summary == find_recipe("quick").summary
    large = instance(recipe.fitted((3, 224, 224)).source, ImagePool)
    assert (large.images, large.batch, large.source.batch) == (256, 64, 32)


@pytest.mark.parametrize(
    ("bits", "options", "trains"),
    [
        ("w4a8", {}, False),
        ("w6a8", {}, False),
        ("w3a8", {}, True),
        ("w4a7", {}, False),
        ("w4a6", {}, True),
        ("w4a8", {"layer_bits": ("first=8", "last=float")}, False),
        ("w8a8", {"layer_bits": ("last=4",)}, True),
    ],
)
def test_fast_tunes_where_activations_or_weights_are_narrow(
    bits: str, options: dict[str, Any], trains: bool
) -> None:
    recipe = resolve_method(bits, "fast", **options).recipe
    assert recipe.fit_weights
    assert recipe.tuning.trains is trains


def test_fitted_weights_need_matched_moments() -> None:
    with pytest.raises(ValueError, match="Set it to True"):
        replace(FAST, match_moments=False)


def test_recipe_of_the_paper_has_the_same_effort_at_all_bits() -> None:
    assert resolve_method("w8a8", "paper").recipe.steps == find_recipe("paper").steps


def test_bits_are_w4a8_by_default_and_w4a4_in_the_published_protocol() -> None:
    assert str(resolve_method().scheme.bits) == "w4a8"
    assert str(resolve_method(placement="relu").scheme.bits) == "w4a4"
    assert str(resolve_method(recipe="paper").scheme.bits) == "w4a4"


@pytest.mark.parametrize(
    ("recipe", "bits", "options", "expected"),
    [
        ("fast", "w4a4", {}, 0.0025),
        ("fast", "w3a3", {}, 0.01),
        ("fast", "w4a4", {"layer_bits": ["first=3"]}, 0.01),
        ("quick", "w4a4", {"steps": 8}, 0.0025),
        ("quick", "w2a2", {}, 0.01),  # its first and last layers have 8 bits
        ("real", "w4a4", {}, 0.0025),
        ("patches", "w4a4", {}, 0.01),  # its weights are not fitted
        (FAST, "w4a4", {}, 0.01),
    ],
)
def test_codes_of_fitted_weights_learn_slowly_from_4_bits_on(
    recipe: str | Recipe, bits: str, options: Any, expected: float
) -> None:
    tuning = resolve_method(bits, recipe, **options).recipe.tuning
    optimizer = instance(instance(tuning, Distillation).optimizer, GridAdam)
    assert optimizer.code_lr == pytest.approx(expected)
    assert (optimizer.scale_lr, optimizer.other_lr) == (1e-3, 5e-4)


def test_recipe_of_the_user_is_carried_out_as_it_is_at_8_bits() -> None:
    mine = replace(find_recipe("quick"), steps=12)
    assert replace(resolve_method("w8a8", mine).recipe, placement=mine.placement) == mine


@pytest.mark.parametrize(("recipe", "known"), [("quick", True), ("paper", False), ("zeroq", False)])
def test_range_of_pixels_is_for_sources_that_keep_to_it(recipe: str, known: bool) -> None:
    """A student that clips images which its teacher sees whole would learn another function."""
    teacher = networks.captured("Residual")
    plan = resolve(teacher, None, "w4a4", recipe, mean=[0.5] * 3, std=[0.25] * 3)
    assert (plan.teacher.input_limits is not None) == known
