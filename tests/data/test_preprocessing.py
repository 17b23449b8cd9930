"""Resizing of images, against an independent reference."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support import torchvision_shim

from gdfq.data.preprocessing import PerChannel, Preprocessing, Resize
from gdfq.errors import UsageError

_OPERATORS = torchvision_shim.define_missing_operators()


def ramp(width: int, height: int) -> Image.Image:
    """An image whose red is the column and whose green is the row."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(width), np.arange(height)[:, None]
    return Image.fromarray(pixels)


def noise(width: int, height: int) -> Image.Image:
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
def test_resize_matches_an_independent_reference(size: tuple[int, int], short: int) -> None:
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


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.mark.parametrize(
    "form",
    [
        tuple,
        list,
        np.array,
        torch.tensor,
        lambda values: np.array(values, np.float32),
        lambda values: torch.tensor(values).view(1, 3, 1, 1),
        lambda values: [np.float64(value) for value in values],
        lambda values: torch.nn.Parameter(torch.tensor(values)),
    ],
)
def test_mean_and_std_are_taken_in_every_form(
    form: Callable[[Sequence[float]], PerChannel],
) -> None:
    found = Preprocessing.of(3, form(IMAGENET[0]), form(IMAGENET[1]))
    assert (found.mean, found.std) == IMAGENET
    assert all(type(value) is float for value in found.mean)


@pytest.mark.parametrize(
    "value", [0.5, np.float32(0.5), torch.tensor(0.5), np.array(0.5), np.float64(0.5)]
)
def test_one_number_is_for_all_channels(value: PerChannel) -> None:
    assert Preprocessing.of(3, value, value) == Preprocessing((0.5,) * 3, (0.5,) * 3)
    assert Preprocessing.of(2, 0, 1) == Preprocessing((0.0,) * 2, (1.0,) * 2)


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        (
            (123.675, 116.28, 103.53),
            (58.395, 57.12, 57.375),
            r"Give mean 0\.485, 0\.456, 0\.406 .*std 0\.229, 0\.224, 0\.225 \(= 58\.395",
        ),
        (127.5, 127.5, r"mean 0\.5 \(= 127\.5 / 255\), std 0\.5"),
        ((103.53, 116.28, 123.675), None, r"std 0\.003922 \(= 1 / 255\)"),
        ((103.53, 116.28, 123.675), (1, 1, 1), r"std 0\.003922, 0\.003922"),
        ((123.675,) * 3, (0.229,) * 3, r"mean 0\.485.*std 0\.229, 0\.229, 0\.229 \(as it is\)"),
        ((0.485,) * 3, (58.395,) * 3, r"mean 0\.485, 0\.485, 0\.485 \(as it is\), std 0\.229"),
        (None, 255, r"std 1 \(= 255 / 255\)"),
        (-123.675, 58.395, r"mean -0\.485"),
    ],
)
def test_values_for_pixels_in_0_to_255_are_refused_with_the_division(
    mean: PerChannel | None, std: PerChannel | None, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        Preprocessing.of(3, mean, std)


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ((0.5,), None, "each of the 3 input channels; got 1"),
        ((0.5, 0.5), None, "each of the 3 input channels"),
        (None, (0.1,) * 4, "each of the 3 input channels"),
        ((0.5, float("nan"), 0.5), None, "mean must be finite"),
        (None, float("inf"), "std must be finite"),
        (None, 0, "std must be positive"),
        (None, (0.5, -0.5, 0.5), "std must be positive"),
        ("0.5", None, "one number for each input channel"),
        ((0.5, None, 0.5), None, "one number for each input channel"),
        ([], None, "one number for each input channel"),
        (np.full((3, 3), 0.5), None, r"shape \[3, 3\]"),
        (True, None, "one number"),
        (1j, None, "one number"),
    ],
)
def test_values_that_are_no_mean_or_std_are_refused(mean: Any, std: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Preprocessing.of(3, mean, std)


@pytest.mark.parametrize("std", [1 / 255, 1 / 65535, 0.5, 1.0])
def test_usual_values_are_taken(std: float) -> None:
    """Networks that take pixels in 0..255, in 0..65535, in -1..1, in 0..1."""
    assert Preprocessing.of(1, 0.5, std).std == (std,)
