"""Students for targets that ask for other grids."""

from dataclasses import replace

import torch

import gdfq
from gdfq.graph.capture import Captured
from gdfq.quantized import QuantizedNetwork
from gdfq.recipes import find_recipe
from gdfq.sources.given import GivenImages
from gdfq.sources.pool import ImagePool


def for_target(teacher: Captured, bits: str, target: str) -> QuantizedNetwork:
    """The student of a network for a target, after two updates on noise."""
    draw = torch.Generator().manual_seed(1)
    images = torch.randn(32, *teacher.input_shape, generator=draw)
    pool = ImagePool(GivenImages(batch=16), 32, 16)
    recipe = replace(find_recipe("fast").with_steps(4), source=pool)
    return gdfq.quantize(teacher, None, bits, recipe, data=images, target=target)
