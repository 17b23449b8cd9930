"""The accuracy drops that `doctor` quotes are those of the benchmarks."""

import json

from benchmarks import measured

from gdfq.analysis.measured import measured_drops


def row(network: str, bits: str, drop: float, **values: object) -> dict[str, object]:
    found = {"network": network, "bits": bits, "placement": "relu", "recipe": "fast", "steps": 2400}
    return {**found, "teacher": {"all": 90.0}, "student": {"all": 90.0 - drop}, **values}


def test_measured_drops_are_means_over_the_seeds_of_full_runs() -> None:
    rows = [
        row("cifar10_resnet20", "w4a4", 1.0),
        row("cifar10_resnet20", "w4a4", 2.0),
        row("cifar10_resnet20", "w4a4", 9.0, steps=50),
        row("cifar10_resnet20", "w4a4", 9.0, placement="full"),
        row("cifar10_resnet20", "w4a4", 9.0, recipe="quick"),
        row("cifar10_resnet20", "w4a8", 9.0),
    ]
    expected = {"network": "CIFAR-10 ResNet-20", "bits": 4, "drop": 1.5, "seeds": 2}
    assert measured.measured(rows) == [expected]


def test_file_of_the_package_is_that_of_the_results() -> None:
    assert json.loads(measured.FILE.read_text()) == measured.measured(measured.rows())


def test_measured_drops_are_those_of_the_bits() -> None:
    assert {found.bits for found in measured_drops(4)} == {4}
    assert not list(measured_drops(5))
