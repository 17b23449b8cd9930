"""A student that version 0.1.0 saved (file format 4) loads and computes what it did then."""

from pathlib import Path

import numpy as np
import torch

import gdfq

FOLDER = Path(__file__).parents[1] / "format4"


def test_load_reads_format_4() -> None:
    """3-bit weights, 8 in the first layer, placement t1 (now relu); outputs as version 0.1.0 computed them."""
    student = gdfq.load(FOLDER)
    assert (str(student.card.bits), student.card.placement) == ("w3a4", "relu")
    assert student.card.layer_bits == ("first=8",)
    assert [spec.shape for spec in student.card.inputs] == [(1, 8, 8)]
    with np.load(FOLDER / "expected.npz") as expected:
        logits = student(torch.from_numpy(expected["images"]))
        torch.testing.assert_close(logits, torch.from_numpy(expected["logits"]))


def test_save_writes_the_present_format(tmp_path: Path) -> None:
    student = gdfq.load(FOLDER)
    student.save(tmp_path)
    images = student.examples[0]
    assert gdfq.load(tmp_path)(images).equal(student(images))
