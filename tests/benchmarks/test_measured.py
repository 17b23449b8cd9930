"""The accuracy drops that `doctor` quotes are those of the benchmarks."""

import json

from benchmarks import measured

from gdfq.analysis.measured import measured_drops
from gdfq.functional.grid import Bits


def row(network: str, bits: str, drop: float, **values: object) -> dict[str, object]:
    found: dict[str, object] = {
        "network": network,
        "bits": bits,
        "placement": "full",
        "recipe": "fast",
    }
    found["steps"] = measured.STEPS
    return {**found, "teacher": {"all": 90.0}, "student": {"all": 90.0 - drop}, **values}


def test_measured_drops_are_means_over_the_seeds_of_full_runs() -> None:
    untuned: dict[str, object] = {
        "network": "cifar10_resnet20",
        "teacher": {"all": 90.0},
        "student": {"all": 89.5},
    }
    rows = [
        row("cifar10_resnet20", "w4a4", 1.0),
        row("cifar10_resnet20", "w4a4", 2.0),
        row("cifar10_resnet20", "w4a4", 9.0, steps=50),
        row("cifar10_resnet20", "w4a4", 9.0, placement="relu"),
        row("cifar10_resnet20", "w4a4", 9.0, recipe="quick"),
        {**untuned, "bits": "w4a4"},
        {**untuned, "bits": "w4a8"},
    ]
    assert measured.measured(rows) == [
        {"network": "CIFAR-10 ResNet-20", "bits": "w4a8", "drop": 0.5, "seeds": 1},
        {"network": "CIFAR-10 ResNet-20", "bits": "w4a4", "drop": 1.5, "seeds": 2},
    ]


def test_file_of_the_package_is_that_of_the_results() -> None:
    assert json.loads(measured.FILE.read_text()) == measured.measured(measured.rows())


def test_measured_drops_are_those_of_the_bits() -> None:
    assert {found.bits for found in measured_drops(Bits(4, 8))} == {"w4a8"}
    assert not list(measured_drops(Bits(5, 8)))
