"""Curves and table of accuracy over the time budget."""

from pathlib import Path
from typing import Any

import pytest
from benchmarks import budget_curves
from support.places import SHARED


def row(budget: float, seconds: float, top1: float, **others: Any) -> dict[str, Any]:
    return {
        "network": "cifar10_resnet20", "bits": "w4a8", "budget": budget, "seed": 0,
        "seconds": seconds, "cpu_seconds": 20.0, "images": 64, "iterations": 12, "steps": 40,
        "teacher": {"all": 90.0}, "student": {"all": top1}, "drop": 90 - top1, "kl": 0.5,
        "peak_mib": 900, **others,
    }  # fmt: skip


REFUSED = {
    "network": "cifar10_resnet20", "bits": "w4a4", "budget": 10.0, "seed": 0, "least": 17
}  # fmt: skip
ROWS = [row(60, 66, 88), row(30, 30, 80), row(60, 60, 89), row(30, 1, 1, bits="w4a4"), REFUSED]


def test_curve_is_the_mean_over_seeds_by_time() -> None:
    assert budget_curves.curve(ROWS, "cifar10_resnet20", "w4a8") == [(30, 80), (63, 88.5)]
    assert budget_curves.curve(ROWS, "other", "w4a8") == []


def test_table_shows_deviations_and_refusals() -> None:
    lines = budget_curves.table(ROWS).splitlines()
    assert lines[2] == (
        "| cifar10_resnet20 | w4a8 | 0:30 | 30 (+0 %) | 20 | 64 x 12, 40 | 80.00 | 10.00 | 0.5000 "
        "| 900 |"
    )
    assert "| 1:00 | 66 (+10 %) |" in lines[3]
    assert lines[5].startswith("| cifar10_resnet20 | w4a4 | 0:10 | refused: at least 17 s |")


def test_picture_has_a_curve_for_each_width(tmp_path: Path) -> None:
    file, others = tmp_path / "curves.svg", tmp_path / "others.svg"
    budget_curves.draw(ROWS, [], file)
    first = file.read_bytes()
    assert b"<svg" in first
    budget_curves.draw(ROWS, [], file)
    assert file.read_bytes() == first
    budget_curves.draw(ROWS, [row(9, 9, 70, method="mct")], others)
    assert "Sony" in others.read_text()
    assert "Sony" not in file.read_text()
    budget_curves.draw([REFUSED], [], tmp_path / "none.svg")
    assert not (tmp_path / "none.svg").exists()


def test_network_is_given_as_the_command_takes_it() -> None:
    words = budget_curves.arguments("cifar10_resnet20")
    assert words[0].endswith("support/real_networks.py:cifar10_resnet20")
    assert words[1:] == [
        *("--weights", f"{SHARED}/models/cifar10_resnet20.safetensors", "--input", "3x32x32"),
        *("--mean", "0.485,0.456,0.406", "--std", "0.229,0.224,0.225"),
    ]


@pytest.mark.parametrize("name", budget_curves.TITLES)
def test_every_network_has_a_title(name: str) -> None:
    assert budget_curves.arguments(name)
