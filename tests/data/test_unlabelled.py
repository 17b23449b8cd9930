"""Photographs that have nothing to do with a network."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gdfq.data.datasets import load_unlabelled, readable_images
from gdfq.data.preprocessing import Resize
from gdfq.errors import GdfqWarning, UsageError


def photograph(path: Path, size: tuple[int, int] = (20, 16), colour: int = 100) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (colour, 0, 0)).save(path)
    return path


def test_all_images_of_a_folder_are_taken_whatever_folders_they_lie_in(tmp_path: Path) -> None:
    for at, name in enumerate(("a.png", "2019/b.jpg", "2019/train/c.png", "test/d.png")):
        photograph(tmp_path / name, colour=50 * at)
    (tmp_path / "notes.txt").write_text("not an image")
    data = load_unlabelled(tmp_path, (3, 8, 8), Resize())
    assert (len(data), data.labels) == (4, None)
    assert data.images(torch.arange(4)).shape == (4, 3, 8, 8)


def test_images_of_another_size_are_resized_as_files_are(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 256, (3, 3, 20, 16), dtype=np.uint8)
    resize = Resize(crop=0.875, interpolation="bicubic")
    for at, image in enumerate(pixels):
        Image.fromarray(image.transpose(1, 2, 0)).save(tmp_path / f"{at}.png")
    of_files = load_unlabelled(tmp_path, (3, 8, 8), resize)
    of_array = load_unlabelled(pixels, (3, 8, 8), resize)
    chosen = torch.tensor([2, 0])
    assert of_array.images(chosen).equal(of_files.images(chosen))
    grey = load_unlabelled(pixels[:, :1], (1, 8, 8), resize)
    assert grey.images(chosen).shape == (2, 1, 8, 8)


def test_labels_that_fit_no_class_are_dropped(tmp_path: Path) -> None:
    file = tmp_path / "other.npz"
    np.savez(file, images=np.zeros((4, 3, 8, 8), np.uint8), labels=[0, 99, 7, 1000])
    data = load_unlabelled(file, (3, 8, 8), Resize())
    assert (len(data), data.labels) == (4, None)


def test_small_images_are_enlarged_with_a_warning(tmp_path: Path) -> None:
    photograph(tmp_path / "small.png", (7, 30))
    photograph(tmp_path / "large.png", (9, 9))
    with pytest.warns(GdfqWarning, match="are smaller than the network's input"):
        load_unlabelled(tmp_path, (3, 8, 8), Resize())
    with pytest.warns(GdfqWarning, match="7x30, smaller than the network's input"):
        load_unlabelled(np.zeros((2, 3, 30, 7), np.uint8), (3, 8, 8), Resize())


def test_damaged_photographs_are_named_and_the_others_read(tmp_path: Path) -> None:
    files = [photograph(tmp_path / f"{name}.png", colour=9 * at) for at, name in enumerate("abc")]
    whole = load_unlabelled(tmp_path, (3, 8, 8), Resize()).images(torch.arange(3))
    files[1].write_bytes(files[1].read_bytes()[:45])  # its header is whole
    data = load_unlabelled(tmp_path, (3, 8, 8), Resize())
    chosen = torch.tensor([2, 1, 0])
    images, damaged = readable_images(data, chosen)
    whole[1] = 0
    assert images.equal(whole[chosen])
    assert list(damaged) == [1]
    assert damaged[1].startswith(f"{files[1]} (")
    with pytest.raises(UsageError, match=r"b\.png is not"):
        data.images(chosen)


def test_unusable_photographs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds none"):
        load_unlabelled(tmp_path, (3, 8, 8), Resize())
    with pytest.raises(UsageError, match="no data at"):
        load_unlabelled(tmp_path / "missing", (3, 8, 8), Resize())
    with pytest.raises(UsageError, match="1 or 3 input channels"):
        load_unlabelled(tmp_path, (4, 8, 8), Resize())
    with pytest.raises(UsageError, match="input shape"):
        load_unlabelled(np.zeros((2, 1, 8, 8), np.uint8), (3, 8, 8), Resize())
    with pytest.raises(UsageError, match="input shape"):
        load_unlabelled(np.zeros((2, 3, 9, 9), np.float32), (3, 8, 8), Resize())
    photograph(tmp_path / "a.png").write_bytes(b"not an image")
    with pytest.raises(UsageError, match=r"a\.png is not"):
        load_unlabelled(tmp_path, (3, 8, 8), Resize())
