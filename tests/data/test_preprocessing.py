"""Resizing of images, against an independent reference."""

from typing import Any

import numpy as np
import pytest
from PIL import Image
from support import torchvision_shim

from gdfq.data.preprocessing import Resize
from gdfq.errors import UsageError

_OPERATORS = torchvision_shim.define_missing_operators()


def ramp(width: Any, height: Any) -> Any:
    """An image whose red is the column and whose green is the row."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(width), np.arange(height)[:, None]
    return Image.fromarray(pixels)


def noise(width: Any, height: Any) -> Any:
    draw = np.random.default_rng(width)
    return Image.fromarray(draw.integers(0, 256, (height, width, 3), np.uint8))


def test_crop_is_the_centre_of_the_resized_image() -> None:
    """10 x 6 covers 6 x 6 as it is; columns 2..7 of it are the middle, and 4 x 4 of 6 x 6 too."""
    pixels = np.array(Resize()(ramp(10, 6), (6, 6)))
    assert pixels[0, :, 0].tolist() == [2, 3, 4, 5, 6, 7]
    assert pixels[:, 0, 1].tolist() == [0, 1, 2, 3, 4, 5]
    pixels = np.array(Resize(crop=4 / 6)(ramp(10, 6), (4, 4)))
    assert pixels[0, :, 0].tolist() == [3, 4, 5, 6]
    assert pixels[:, 0, 1].tolist() == [1, 2, 3, 4]


def test_squash_keeps_the_whole_image() -> None:
    """Nearest of 8 columns in 4: the second of each pair; rows stay."""
    resize = Resize(squash=True, interpolation="nearest")
    pixels = np.array(resize(ramp(8, 4), (4, 4)))
    assert pixels[0, :, 0].tolist() == [1, 3, 5, 7]
    assert pixels[:, 0, 1].tolist() == [0, 1, 2, 3]
    pixels = np.array(Resize(0.5, True, "nearest")(ramp(8, 4), (2, 2)))
    assert pixels[0, :, 0].tolist() == [3, 5]


@pytest.mark.needs("torchvision")
@pytest.mark.parametrize("size", [(300, 200), (224, 224), (231, 500), (97, 61)])
@pytest.mark.parametrize("short", [224, 232, 235, 256])
def test_resize_matches_an_independent_reference(size: Any, short: Any) -> None:
    from torchvision import transforms

    image = noise(*size)
    mode = transforms.InterpolationMode.BICUBIC
    expected = transforms.Compose(
        [transforms.Resize(short, interpolation=mode), transforms.CenterCrop(224)]
    )(image)
    found = Resize(224 / short, interpolation="bicubic")(image, (224, 224))
    assert np.array_equal(np.array(found), np.array(expected))


def test_resize_refuses_invalid_values() -> None:
    with pytest.raises(UsageError, match="crop must lie in"):
        Resize(crop=1.5)
    with pytest.raises(UsageError, match=r"one of nearest, .*; got 'random'"):
        Resize(interpolation="random")
