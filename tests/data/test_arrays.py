"""Images and labels in arrays and .npz files: what fits, and what else they may be."""

import hashlib
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.narrowing import present

from gdfq.data.datasets import as_labels, load_data, warn_of_unnormalised_floats
from gdfq.data.preprocessing import Preprocessing
from gdfq.data.tensors import summary_of
from gdfq.errors import GdfqWarning, UsageError

SHAPE = (3, 8, 6)
BYTES = np.zeros((4, *SHAPE), np.uint8)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (BYTES.astype(np.uint16), r"uint16.*images\.astype\(np\.uint8\)"),
        (BYTES.astype(np.uint16) + 300, r"\(images / 257\)"),
        (BYTES.astype(np.int64), r"int64.*images\.astype\(np\.uint8\)"),
        (BYTES.astype(bool), r"\* 255"),
        (BYTES + 0.5, r"\(images \* 255\)"),
        (BYTES + 200.0, r"images\.round\(\)"),
        (BYTES - 1.0, "already normalised"),
        (BYTES.transpose(0, 2, 3, 1), r"transpose\(0, 3, 1, 2\)"),
        (BYTES[:, :1], "Repeat the channel"),
        (np.zeros((4, 4, 8, 6), np.uint8), r"alpha: give images\[:, :3\]"),
    ],
)
def test_npz_with_other_images_says_how_to_convert(
    tmp_path: Path, images: np.ndarray, message: str
) -> None:
    np.savez(tmp_path / "x.npz", images=images)
    with pytest.raises(UsageError, match=message):
        load_data(tmp_path / "x.npz", SHAPE, 5)


def test_array_without_channels_says_how_to_convert() -> None:
    with pytest.raises(UsageError, match=r"images\[:, None\]"):
        load_data(BYTES[:, 0], (1, 8, 6), 5)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int64, np.float32, np.float64])
def test_whole_labels_of_every_dtype_are_read(tmp_path: Path, dtype: type) -> None:
    np.savez(tmp_path / "x.npz", images=BYTES, labels=np.array([0, 4, 2, 3], dtype))
    assert present(load_data(tmp_path / "x.npz", SHAPE, 5).labels).tolist() == [0, 4, 2, 3]
    pair: tuple[Any, Any] = (BYTES, np.array([0, 4, 2, 3], dtype))
    assert present(load_data(pair, SHAPE, 5).labels).dtype == torch.int64


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0.5, 1, 2, 3], "whole numbers"),
        ([float("nan"), 1, 2, 3], "whole numbers"),
        (np.eye(5)[:4], r"labels\.argmax\(1\)"),
        (np.zeros((4, 1), int), r"labels\[:, 0\]"),
        ([True, False, True, True], "torch.bool"),
        (["cat", "dog", "cat", "dog"], "whole numbers"),
        ([1, 2, 3, 5], r"0\.\.4.*count from 1"),
        ([0, 1, 2, 5], r"0\.\.4.*belong together"),
        ([0, 1, 2], "one label for each image"),
    ],
)
def test_labels_that_are_no_classes_are_refused(labels: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_data((BYTES, labels), SHAPE, 5)


def test_labels_of_a_tensor_that_trains_are_read() -> None:
    assert as_labels(torch.tensor([1.0, 2.0], requires_grad=True)).tolist() == [1, 2]


def test_images_with_nan_are_refused() -> None:
    with pytest.raises(UsageError, match="finite"):
        load_data(torch.full((2, *SHAPE), torch.nan), SHAPE, None)
    with pytest.raises(UsageError, match="array of numbers"):
        load_data(np.array([None]), SHAPE, None)


def test_other_files_are_named_for_what_they_are(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", BYTES)
    with pytest.raises(UsageError, match=r"it is one array\. Write np\.savez"):
        load_data(tmp_path / "x.npy", SHAPE, 5)
    (tmp_path / "x.png").write_bytes(b"\x89PNG")
    with pytest.raises(UsageError, match="it is one image"):
        load_data(tmp_path / "x.png", SHAPE, 5)
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a/x.png", b"")
    with pytest.raises(UsageError, match="Unpack the archive"):
        load_data(tmp_path / "x.zip", SHAPE, 5)
    np.savez(tmp_path / "x.npz", x_test=BYTES, y_test=[0])
    with pytest.raises(UsageError, match="has x_test, y_test"):
        load_data(tmp_path / "x.npz", SHAPE, 5)


@pytest.mark.parametrize(("low", "high", "warns"), [(0, 255, True), (0, 1, True), (-2, 2, False)])
def test_floats_that_look_like_pixels_are_told(low: float, high: float, warns: bool) -> None:
    images = torch.linspace(low, high, 12).view(1, 3, 2, 2)
    half = Preprocessing((0.5,) * 3, (0.25,) * 3)
    if warns:
        with pytest.warns(GdfqWarning, match="taken as normalised"):
            warn_of_unnormalised_floats(images, half)
    else:
        warn_of_unnormalised_floats(images, half)
    warn_of_unnormalised_floats(images, Preprocessing((0.0,) * 3, (1 / 255,) * 3))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16, torch.bfloat16])
def test_summary_hashes_the_bytes_of_every_dtype(dtype: torch.dtype) -> None:
    images = (200 * torch.rand(4, *SHAPE)).to(dtype)
    whole = torch.int16 if dtype == torch.bfloat16 else dtype  # NumPy has no bfloat16
    labels = np.array([0, 4, 2, 3])
    stored = images.view(whole).numpy().tobytes() + labels.tobytes()
    summary = summary_of(load_data((images, labels), SHAPE, 5))
    assert summary == f"4 images, {hashlib.sha256(stored).hexdigest()[:16]}"
