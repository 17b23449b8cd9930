"""Given data as tensors: what identifies them."""

import hashlib

import torch

from gdfq.data.datasets import load_data
from gdfq.data.tensors import TensorData, summary_of


def test_summary_of_bfloat16_images_hashes_their_bytes() -> None:
    """NumPy has no such type. 1.0 in bfloat16 has the bytes 80 3F, a label has eight."""
    images = torch.ones(2, 3, 1, 1, dtype=torch.bfloat16)
    data = load_data((images, torch.tensor([1, 0])), (3, 1, 1), 2)
    content = b"\x80\x3f" * 6 + b"\1" + bytes(15)
    assert summary_of(data) == f"2 images, {hashlib.sha256(content).hexdigest()[:16]}"


def test_summary_does_not_depend_on_the_layout_in_memory() -> None:
    """As checkpoints of earlier versions have it: the numbers of the inputs, then the labels."""
    numbers = torch.arange(120.0).view(20, 6)
    strided = numbers.t().contiguous().t()
    flags, labels = torch.arange(20) > 3, torch.arange(20)
    every_other = torch.arange(40).div(2, rounding_mode="floor")[::2]
    parts = (numbers[::2], flags[::2], labels)
    content = b"".join(part.numpy().tobytes() for part in parts)
    for given in (labels, every_other):
        found = summary_of(TensorData((strided, flags), given))
        assert found == f"20 images, {hashlib.sha256(content).hexdigest()[:16]}"


def test_summary_of_one_image_takes_its_label_from_among_others() -> None:
    labels = torch.tensor([7, 1])[::2]  # one number with a stride of two
    content = bytes(12) + b"\7" + bytes(7)
    expected = f"1 images, {hashlib.sha256(content).hexdigest()[:16]}"
    assert summary_of(TensorData((torch.zeros(1, 3),), labels)) == expected
