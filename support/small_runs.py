"""Small recipes and students for tests, and the comparison of results."""

from dataclasses import replace

import torch
from support import networks
from torch import Tensor, nn

import gdfq
from gdfq.functional.grid import Bits
from gdfq.graph.capture import Captured
from gdfq.quantized import QuantizedNetwork
from gdfq.recipes import Recipe, find_recipe
from gdfq.sources.base import Batch
from gdfq.sources.generator import GeneratorSource
from gdfq.sources.given import GivenImages
from gdfq.sources.pixels import OptimisedSource
from gdfq.sources.pool import ImagePool
from gdfq.student.build import Student, build_student
from gdfq.student.scheme import Placement, Scheme
from gdfq.tuning.calibrate import calibrate_
from gdfq.tuning.reconstruct import Reconstruction


def state(network: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters and buffers."""
    return {name: value.clone() for name, value in network.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two states are equal, bit by bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def small(recipe: Recipe) -> Recipe:
    """The recipe with few images and iterations."""
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


def quantized_by_fast(
    model: nn.Module | Captured,
    bits: str,
    placement: Placement = "full",
    shape: tuple[int, ...] = networks.SHAPE,
) -> QuantizedNetwork:
    """The learned student of a network, after two updates on noise."""
    recipe = find_recipe("fast").with_steps(5)
    draw = torch.Generator().manual_seed(1)
    data = torch.randn(64, *shape, generator=draw)
    recipe = replace(recipe, source=ImagePool(GivenImages(batch=16), 64, 16))
    return gdfq.quantize(
        model, torch.zeros(1, *shape), bits, recipe, data=data, placement=placement
    )


def calibrated(teacher: Captured, bits: str, placement: Placement) -> Student:
    """A student whose ranges one batch of noise has set."""
    student = build_student(teacher, Scheme(Bits.parse(bits), placement))
    images = networks.images(64)
    logits = teacher.network(images)
    calibrate_(student, [Batch((images,), logits.argmax(1), logits)], steps=1)
    return student
