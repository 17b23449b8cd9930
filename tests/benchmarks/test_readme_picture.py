"""The picture of the README shows what the results say."""

from dataclasses import replace
from typing import Any

import pytest
from benchmarks import readme_picture


def row(bits: str, top1: float, interval: list[float], **others: Any) -> dict[str, Any]:
    return {
        "network": "net", "recipe": "fast", "steps": 2400, "placement": "relu", "bits": bits,
        "teacher": {"all": 90.0}, "student": {"all": top1}, "drop_interval": interval, **others,
    }  # fmt: skip


def test_picture_is_that_of_the_results() -> None:
    assert readme_picture.PICTURE.read_text() == readme_picture.picture(readme_picture.read_rows())


def test_bars_are_means_over_seeds() -> None:
    rows = [
        row("w4a4", 88.0, [1.0, 3.0]),
        row("w4a4", 89.0, [0.0, 2.0], placement="relu"),
        row("w4a4", 10.0, [79.0, 81.0], steps=50),
        row("w4a4", 10.0, [79.0, 81.0], recipe="quick"),
        row("w4a4", 10.0, [79.0, 81.0], placement="full"),
        row("w8a8", 90.5, [-1.0, 0.0]),
    ]
    *others, four_bits, three_bits, two_bits = readme_picture.bars(rows, "net")
    assert four_bits.deviation == pytest.approx(0.5**0.5)
    assert [*others, replace(four_bits, deviation=None), three_bits, two_bits] == [
        readme_picture.Bar("full precision", 90.0),
        readme_picture.Bar("w8a8", 90.5, 90.0, 91.0, 1),
        readme_picture.Bar("w4a4", 88.5, 87.5, 89.5, 2),
        readme_picture.Bar("w3a3", None),
        readme_picture.Bar("w2a2", None),
    ]


def test_length_of_a_bar_is_its_accuracy() -> None:
    assert readme_picture._x(50.0) - readme_picture._x(0.0) == pytest.approx(
        readme_picture._x(100.0) - readme_picture._x(50.0)
    )
    assert readme_picture._x(100.0) - readme_picture._x(0.0) == readme_picture._BAR_WIDTH
