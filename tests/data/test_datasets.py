"""Images and labels from files, folders and objects."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import networks, torchvision_shim
from support.narrowing import present

from gdfq.data.datasets import ArrayData, load_data
from gdfq.data.preprocessing import Resize
from gdfq.errors import UsageError


def test_load_data_reads_image_folders(tmp_path: Path) -> None:
    from PIL import Image

    for name, colour in (("b", (255, 0, 0)), ("a", (0, 255, 0))):
        (tmp_path / name).mkdir()
        Image.new("RGB", (20, 16), colour).save(tmp_path / name / "x.png")
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    data = load_data(tmp_path, (3, 8, 8), 2)
    assert present(data.labels).tolist() == [0, 1]  # a before b
    images = data.images(torch.tensor([0, 1]))
    assert images.shape == (2, 3, 8, 8)
    assert images[:, :, 3, 3].tolist() == [[0, 255, 0], [255, 0, 0]]
    assert load_data(tmp_path, (1, 8, 8), 2).images(torch.tensor([0])).shape == (1, 1, 8, 8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p.write_bytes(b"not a zip"), "neither"),
        (lambda p: np.savez(p, images=np.zeros((1, 3, 8, 8)), labels=[0]), "uint8"),
        (
            lambda p: np.savez(p, images=np.zeros((1, 3, 8, 8), np.uint8), labels=[0.5]),
            "integers",
        ),
        (
            lambda p: np.savez(p, images=np.array([None], object), labels=[0]),
            "neither",  # an object array would need pickle
        ),
        (lambda p: p.mkdir(), "at least one image"),
    ],
)
def test_load_data_refuses_unreadable_data(
    tmp_path: Path, make: Callable[[Path], object], message: str
) -> None:
    path = tmp_path / "data.npz"
    make(path)
    with pytest.raises(UsageError, match=message):
        load_data(path, (3, 8, 8), 5)


def test_load_data_names_a_broken_image(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "bad.png").write_bytes(b"\x89PNG")
    with pytest.raises(UsageError, match=r"bad\.png"):
        load_data(tmp_path, (3, 8, 8), 5)


def test_load_data_accepts_an_object_of_the_user() -> None:
    data = ArrayData(networks.images(2), None)
    assert load_data(data, networks.SHAPE, 5) is data


def test_load_data_needs_labels_for_a_test_only(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", images=np.zeros((2, 3, 8, 8), np.uint8))
    data = load_data(tmp_path / "data.npz", networks.SHAPE, 5)
    assert data.labels is None
    assert len(data) == 2
    np.savez(tmp_path / "other.npz", labels=[0])
    with pytest.raises(UsageError, match=r"must hold 'images'.*has labels"):
        load_data(tmp_path / "other.npz", networks.SHAPE, 5)


_OPERATORS = torchvision_shim.define_missing_operators()


def ramp(width: int, height: int) -> Image.Image:
    """Red counts columns, green counts rows."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(width), np.arange(height)[:, None]
    return Image.fromarray(pixels)


def test_load_data_resizes_image_folders(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    ramp(8, 4).save(tmp_path / "a" / "x.png")
    data = load_data(tmp_path, (3, 4, 4), 2, Resize(squash=True, interpolation="nearest"))
    assert data.images(torch.tensor([0]))[0, 0, 0].tolist() == [1, 3, 5, 7]
    data = load_data(tmp_path, (3, 4, 4), 2)
    assert data.images(torch.tensor([0]))[0, 0, 0].tolist() == [2, 3, 4, 5]
