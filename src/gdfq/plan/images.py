"""The images of a plan: given ones, test images, and candidates from elsewhere."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from gdfq.data.datasets import ImageData, how_labelled, readable_images
from gdfq.data.preprocessing import Preprocessing
from gdfq.data.tensors import Data as GivenData
from gdfq.data.tensors import TensorData
from gdfq.errors import UsageError
from gdfq.graph.capture import Captured
from gdfq.plan.elsewhere import load_candidates
from gdfq.plan.network import Network
from gdfq.plan.options import Data, ImageOptions
from gdfq.recipes import Recipe
from gdfq.sources.base import Source
from gdfq.sources.candidates import Candidates
from gdfq.sources.given import load_given, on_images


def load_images(data: Data, network: Network) -> GivenData:
    """Read images for a network.

    Args:
        data: The images, as a path or in memory.
        network: The network, whose class names identify class folders.

    Raises:
        UsageError: They cannot be used.
    """
    teacher = network.teacher
    return load_given(
        data,
        teacher.inputs,
        teacher.classes,
        network.preprocessing,
        network.class_names,
        network.encode,
    )


def load_test_images(data: Data, network: Network) -> GivenData:
    """Read test images for a network.

    Args:
        data: The images, as a path or in memory; with labels for a classifier.
        network: The network, whose class names identify class folders.

    Raises:
        UsageError: They cannot be used, or lack the labels that a classifier needs.
    """
    images = load_images(data, network)
    if images.labels is None and network.teacher.classes is not None:
        raise UsageError(f"test images need labels; these have none. {how_labelled(images)}")
    return images


@dataclass(frozen=True, eq=False)
class GivenImages:
    """The images that the user gives.

    Attributes:
        data: Real images instead of synthetic ones.
        test: Images to measure on.
        candidates: Images from elsewhere.
    """

    data: GivenData | None = None
    test: GivenData | None = None
    candidates: Candidates | None = None

    @classmethod
    def read(cls, images: ImageOptions, network: Network) -> "GivenImages":
        """Read the images that options name.

        Raises:
            UsageError: Some cannot be used.
        """
        teacher, preprocessing = network.teacher, network.preprocessing
        data, test, proxy = images.get("data"), images.get("test"), images.get("proxy")
        return cls(
            None if data is None else load_images(data, network),
            None if test is None else load_test_images(test, network),
            None if proxy is None else load_candidates(proxy, teacher, preprocessing),
        )

    def limiting(self, teacher: Captured) -> Captured:
        """Return the teacher, without input limits if images exceed them.

        They are given as floats, and were normalised in another way, for instance each by itself.
        """
        limits = teacher.input_limits
        pools = (self.data, self.test, None if self.candidates is None else self.candidates.data)
        if limits is None or all(
            pool is None or isinstance(pool, TensorData) or _within(pool, limits) for pool in pools
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
    if not readable_images(data, chosen[:1])[0].is_floating_point():
        return True
    by_channel = data.images(chosen).transpose(0, 1).flatten(1)
    low, high = torch.tensor(limits).T
    slack = _LIMITS_SLACK * (high - low)
    return bool(
        (by_channel.amin(1) >= low - slack).all() and (by_channel.amax(1) <= high + slack).all()
    )


def source_of(
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
