"""Image files of every mode become the pixels that they show."""

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gdfq.data.datasets import load_data
from gdfq.data.decoding import check_image, decoded
from gdfq.errors import GdfqWarning, UsageError

LEVELS = np.arange(0, 256, 5, dtype=np.uint8).reshape(4, 13)


def pixels(path: Path, channels: int = 1) -> np.ndarray:
    check_image(path)
    return np.array(decoded(path, channels))


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("channels", [1, 3])
def test_16_bits_are_scaled(tmp_path: Path, suffix: str, channels: int) -> None:
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(LEVELS.astype(np.uint16) * 257).save(path)
    found = pixels(path, channels)
    assert np.array_equal(found if channels == 1 else found[..., 1], LEVELS)


def test_16_bits_are_rounded(tmp_path: Path) -> None:
    values = np.array([[0, 128, 129, 385, 386, 65535]], np.uint16)  # 385.5 = 1.5 * 257
    Image.fromarray(values).save(tmp_path / "x.png")
    assert pixels(tmp_path / "x.png").tolist() == [[0, 0, 1, 1, 2, 255]]


def test_pgm_of_another_maximum_is_scaled(tmp_path: Path) -> None:
    (tmp_path / "x.pgm").write_bytes(b"P5 3 1 1023\n" + struct.pack(">3H", 0, 341, 1023))
    assert pixels(tmp_path / "x.pgm").tolist() == [[0, 85, 255]]


def test_floats_in_0_to_1_are_scaled_and_others_refused(tmp_path: Path) -> None:
    Image.fromarray(LEVELS.astype(np.float32) / 255).save(tmp_path / "x.tif")
    assert np.array_equal(pixels(tmp_path / "x.tif"), LEVELS)
    for values in (LEVELS.astype(np.float32), -LEVELS.astype(np.float32) / 255, LEVELS * np.nan):
        Image.fromarray(values.astype(np.float32)).save(tmp_path / "x.tif")
        with pytest.raises(ValueError, match=r"must lie in 0\.\.1"):
            pixels(tmp_path / "x.tif")


def test_32_bits_are_refused_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    Image.fromarray(LEVELS).save(tmp_path / "a" / "a.png")
    Image.fromarray(LEVELS.astype(np.int32) * 1000).save(tmp_path / "a" / "b.tif")
    with pytest.raises(UsageError, match=r"b\.tif is not: it holds pixels.*mode I"):
        load_data(tmp_path, (1, 4, 4), 1)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_other_modes_are_what_pillow_makes_of_them(tmp_path: Path, mode: str) -> None:
    """As torchvision reads them: `Image.open(path).convert("RGB")`."""
    source = Image.fromarray(np.stack([LEVELS, LEVELS.T.reshape(4, 13), 255 - LEVELS], 2))
    path = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    source.convert(mode).save(path)
    assert np.array_equal(pixels(path, 3), np.array(Image.open(path).convert("RGB")))


def test_one_bit_is_black_and_white(tmp_path: Path) -> None:
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "x.png")
    assert pixels(tmp_path / "x.png").tolist() == [[255, 0]]


def test_first_frame_of_an_animation_is_used_with_a_warning(tmp_path: Path) -> None:
    first, second = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    for name in ("x.png", "x.webp", "x.tif"):
        folder = tmp_path / name
        (folder / "a").mkdir(parents=True)
        options: dict[str, Any] = {"lossless": True} if name == "x.webp" else {}
        first.save(folder / "a" / name, save_all=True, append_images=[second], **options)
        with pytest.warns(GdfqWarning, match="1 of 1 images .* hold several frames"):
            data = load_data(folder, (3, 4, 4), 1)
        assert data.images(torch.tensor([0]))[0, :, 0, 0].tolist() == [255, 0, 0]


def test_exif_orientation_is_not_applied_with_a_warning(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    (tmp_path / "a").mkdir()
    source = Image.new("RGB", (8, 4), "red")
    source.save(tmp_path / "a" / "x.jpg", exif=exif)
    with pytest.warns(GdfqWarning, match="EXIF orientation"):
        load_data(tmp_path, (3, 4, 4), 1)
    assert decoded(tmp_path / "a" / "x.jpg", 3).size == (8, 4)


def test_truncated_image_is_refused_by_name(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(
        buffer, "JPEG"
    )
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.jpg").write_bytes(buffer.getvalue()[:-500])
    with pytest.raises(UsageError, match=r"x\.jpg is not: .*truncated"):
        load_data(tmp_path, (3, 4, 4), 1)
