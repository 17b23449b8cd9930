"""The evidence of a run is gathered and written."""

from pathlib import Path

import numpy as np
import pytest
from support import networks
from support.narrowing import present

import gdfq
from gdfq.analysis.layers import Layers, measure_layers
from gdfq.graph.capture import Captured
from gdfq.quantized import QuantizedNetwork
from gdfq.recipes import Recipe
from gdfq.runs.diagnostics import gather, write_evidence


@pytest.fixture(scope="module")
def layers(teacher: Captured, quantized: QuantizedNetwork) -> Layers:
    return measure_layers(teacher, quantized.network, present(quantized.observations).images)


def test_gather_measures_all_sections(
    teacher: Captured, quantized: QuantizedNetwork, tmp_path: Path
) -> None:
    evidence = gather(teacher, quantized)
    assert set(evidence.sections) == {"trust", "layers", "images", "test"}
    assert evidence.missing == {}
    test = evidence.sections["test"]
    assert test["teacher"] == pytest.approx(quantized.metrics["teacher"]["top1"])
    assert test["student"] == pytest.approx(quantized.metrics["student"]["top1"])
    write_evidence(evidence, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evidence.json", "evidence.npz"]
    with np.load(tmp_path / "evidence.npz", allow_pickle=False) as file:
        assert file["images.grid"].dtype == np.uint8


def test_gather_gives_the_reason_for_a_missing_section(
    teacher: Captured, quantized: QuantizedNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **_named: object) -> None:
        raise RuntimeError("no memory\nat all")

    monkeypatch.setattr("gdfq.runs.diagnostics.measure_layers", fails)
    evidence = gather(teacher, quantized)
    assert evidence.missing == {"layers": "RuntimeError: no memory"}
    assert set(evidence.sections) == {"trust", "images", "test"}
    nothing = gdfq.QuantizedNetwork(quantized.network, quantized.card)
    assert set(gather(teacher, nothing).missing) == {"trust", "layers", "images", "test"}


@pytest.mark.parametrize("name", ["Branches", "Shared", "Transposed"])
def test_gather_measures_other_networks(name: str, tiny: Recipe) -> None:
    teacher = networks.captured(name)
    result = gdfq.quantize(teacher, networks.images(1), "w4a4", tiny, placement="full")
    assert gather(teacher, result).missing == {"test": "no labelled test images were given"}
