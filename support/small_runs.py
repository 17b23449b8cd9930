"""Recipes at a size for tests, and the comparison of what runs end with."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from gdfq.recipes import Recipe
from gdfq.sources.generator import GeneratorSource
from gdfq.sources.given import GivenImages
from gdfq.sources.pixels import OptimisedSource
from gdfq.sources.pool import ImagePool
from gdfq.tuning.reconstruct import Reconstruction


def state(network: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters and buffers."""
    return {name: value.clone() for name, value in network.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two states are equal to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def small(recipe: Recipe) -> Recipe:
    """A recipe at a size for tests."""
    source = recipe.source
    if isinstance(source, GeneratorSource):
        source = replace(source, batch=8)
    elif isinstance(source, OptimisedSource):
        source = replace(source, batch=8, iterations=5)
    elif isinstance(source, ImagePool):
        made = source.source
        if not isinstance(made, GivenImages):
            made = replace(made, batch=8, iterations=5)  # type: ignore[type-var]
        source = replace(source, source=made, images=24, batch=8)
    if isinstance(recipe.tuning, Reconstruction):
        recipe = replace(recipe, tuning=replace(recipe.tuning, images=24))
    return replace(recipe, source=source)
