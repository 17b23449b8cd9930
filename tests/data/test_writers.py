"""Synthetic images are written in formats that other tools read, all with the same pixels."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.narrowing import present
from torch import Tensor

from gdfq.data.datasets import load_data
from gdfq.data.preprocessing import Preprocessing
from gdfq.data.writers import ImageFiles
from gdfq.errors import UsageError


def some(count: int, *shape: int) -> tuple[Tensor, Preprocessing]:
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=draw)
    return pixels, Preprocessing.of(shape[0], None, None)


@pytest.mark.parametrize("channels", [1, 3])
def test_image_files_of_all_forms_hold_the_same_pixels(tmp_path: Path, channels: int) -> None:
    pixels, preprocessing = some(12, channels, 5, 7)
    labels = torch.tensor([11, 0, 3, 0, 11, 5, 5, 2, 1, 0, 4, 9])  # 6, 7, 8 and 10 have none
    files = ImageFiles(tmp_path / "fakes", png=True)
    files.prepare((channels, 5, 7))
    paths = files.write(preprocessing(pixels), labels, preprocessing, 12)
    assert [path.name for path in paths] == ["images.npz", "images.npy", "png"]
    folder = load_data(tmp_path / "fakes" / "png", (channels, 5, 7), 12)
    kept = load_data(tmp_path / "fakes" / "images.npz", (channels, 5, 7), 12)
    order = labels.argsort(stable=True)  # a folder goes class by class, and by number within
    assert torch.equal(present(folder.labels), labels[order])
    assert torch.equal(folder.images(torch.arange(12)), pixels[order])
    assert torch.equal(kept.images(order), pixels[order])
    floats = torch.from_numpy(np.load(tmp_path / "fakes" / "images.npy"))
    assert torch.equal(preprocessing.pixels(floats), pixels)


def test_image_files_have_names_in_numerical_order(tmp_path: Path) -> None:
    pixels, preprocessing = some(11, 3, 2, 2)
    files = ImageFiles(tmp_path, png=True)
    files.write(preprocessing(pixels), torch.full((11,), 99), preprocessing, 101)
    folders = sorted(path.name for path in (tmp_path / "png").iterdir())
    assert (folders[0], folders[2], folders[-1], len(folders)) == ("000", "002", "100", 101)
    names = sorted(path.name for path in (tmp_path / "png" / "099").iterdir())
    assert (names[0], names[-1]) == ("00.png", "10.png")


def test_image_files_keep_the_order_of_channels(tmp_path: Path) -> None:
    red = torch.zeros(1, 3, 2, 2)
    red[:, 0] = 1
    ImageFiles(tmp_path, png=True).write(red, None, Preprocessing.of(3, None, None), 1)
    with Image.open(tmp_path / "png" / "0" / "0.png") as image:
        assert image.getpixel((0, 0)) == (255, 0, 0)
    with np.load(tmp_path / "images.npz") as file:
        assert file.files == ["images"]  # a network without classes has no labels


@pytest.mark.parametrize("there", ["images.npz", "images.npy", "png"])
def test_image_files_do_not_overwrite_images(tmp_path: Path, there: str) -> None:
    (tmp_path / there).touch()
    with pytest.raises(UsageError, match="already holds images"):
        ImageFiles(tmp_path).prepare((3, 8, 8))


@pytest.mark.parametrize("shape", [(2, 64), (4, 8, 8), (1, 4, 4, 4)])
def test_image_files_refuse_png_for_other_shapes(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="Remove --png"):
        ImageFiles(tmp_path / "x", png=True).prepare(shape)
    assert not (tmp_path / "x").exists()
    ImageFiles(tmp_path / "x").prepare(shape)
