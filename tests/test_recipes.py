"""Recipes: published values, schedules and what may be combined."""

from dataclasses import replace

import pytest
from support import networks
from support.narrowing import instance
from support.small_runs import small

import gdfq
from gdfq import RECIPES, UsageError
from gdfq.graph.capture import Captured
from gdfq.optim import SgdConfig
from gdfq.quantizers.family import MINMAX
from gdfq.recipes import FAST, GENIE, PAPER, Recipe
from gdfq.sources.generator import GeneratorSource
from gdfq.sources.pool import ImagePool
from gdfq.tuning.distill import Distillation


def test_with_steps_scales_the_published_schedule() -> None:
    assert (PAPER.steps, PAPER.calibration, PAPER.warmup) == (80_000, 800, 800)
    imagenet = RECIPES["paper-imagenet"]
    assert (imagenet.calibration, imagenet.warmup) == (800, 10_000)
    short = imagenet.with_steps(2000)
    assert (short.steps, short.calibration, short.warmup) == (2000, 500, 500)
    long = imagenet.with_steps(100_000)
    assert (long.calibration, long.warmup) == (800, 10_000)
    assert RECIPES["round"].with_steps(60).calibration == 60


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
