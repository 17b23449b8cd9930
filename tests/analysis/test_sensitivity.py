"""Sensitivity of layers."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import networks
from support.calls import rows_of_calls
from torch import fx

import gdfq
from gdfq.analysis import sensitivity
from gdfq.analysis.layers import measure_layers
from gdfq.execution.budget import MemoryBudget
from gdfq.functional import grid
from gdfq.graph.batch_norms import fold_batch_norms
from gdfq.graph.capture import Captured
from gdfq.graph.memory import forward_bytes
from gdfq.quantized import QuantizedNetwork
from gdfq.quantizers.lsq import best_weight_grid
from gdfq.recipes import Recipe


def test_sensitivity_is_higher_with_fewer_bits(teacher: Captured, tiny: Recipe) -> None:
    batch = networks.images(8)
    folded = fold_batch_norms(teacher)

    def of(bits: str) -> Any:
        network = gdfq.quantize(teacher, networks.images(1), bits, tiny).network
        return sensitivity.measure_sensitivity(folded, network, batch)

    coarse, fine = of("w2a2"), of("w8a8")
    assert coarse.kind == fine.kind == "divergence"
    assert coarse.by_layer.keys() == fine.by_layer.keys()
    assert all(coarse.by_layer[name] > 10 * fine.by_layer[name] for name in fine.by_layer)


def test_sensitivity_of_a_large_network_is_the_error_of_the_layer(
    teacher: Captured, quantized: QuantizedNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensitivity, "_MAX_OPERATIONS", 1)
    batch = networks.images(8)
    folded = fold_batch_norms(teacher)
    found = sensitivity.measure_sensitivity(folded, quantized.network, batch)
    assert found.kind == "error"
    # The first layer's input is float, so its error is that of its weight alone.
    weight = folded.network.get_parameter("conv1.folded_weight")
    bias = folded.network.get_parameter("conv1.folded_bias")
    ends = best_weight_grid(weight, 3, grid.Layout.ROWS)
    rounded = grid.fake_quantize(weight, *ends, 3)
    exact, other = (torch.conv2d(batch, w, bias, padding=1) for w in (weight, rounded))
    expected = float((exact - other).square().sum() / exact.square().sum())
    assert found.by_layer["conv2d"] == pytest.approx(expected, rel=1e-4)


def test_sensitivity_of_a_float_layer_is_none(teacher: Captured, tiny: Recipe) -> None:
    result = gdfq.quantize(teacher, networks.images(1), "w4a4", tiny, layer_bits=["conv2=float"])
    found = {
        layer.name: layer
        for layer in measure_layers(teacher, result.network, networks.images(4)).layers
    }
    assert found["conv2"].bits is found["conv2"].sensitivity is found["conv2"].weight_sqnr is None


@pytest.mark.parametrize("kind", ["divergence", "error"])
def test_sensitivity_does_not_depend_on_the_memory_budget(
    teacher: Captured,
    quantized: QuantizedNetwork,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
    rows: list[int],
) -> None:
    """With a budget for two images, eight pass in four parts."""
    if kind == "error":
        monkeypatch.setattr(sensitivity, "_MAX_OPERATIONS", 1)
    folded = fold_batch_norms(teacher)
    whole = sensitivity.measure_sensitivity(folded, quantized.network, networks.images(8))
    assert max(rows) == 8
    rows.clear()
    two = MemoryBudget(2 * 4 * forward_bytes(folded.network.graph))
    parts = sensitivity.measure_sensitivity(
        folded, quantized.network, networks.images(8), memory=two
    )
    assert max(rows) == 2
    assert whole.kind == parts.kind == kind
    assert parts.by_layer == pytest.approx(dict(whole.by_layer), rel=1e-4)


def test_evidence_of_layers_takes_as_many_images_as_fit(
    teacher: Captured, quantized: QuantizedNetwork, rows: list[int]
) -> None:
    images = networks.images(40)
    assert measure_layers(teacher, quantized.network, images).images == max(rows) == 32
    rows.clear()
    graph = fold_batch_norms(teacher).network.graph
    three = MemoryBudget(3 * 6 * forward_bytes(graph) + 1)
    assert measure_layers(teacher, quantized.network, images, memory=three).images == 3
    assert max(rows) == 3
    least = measure_layers(teacher, quantized.network, images, memory=MemoryBudget(1))
    assert least.images == 1


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The images of each pass through a network, whole or node by node."""
    run = fx.Interpreter.run_node
    with rows_of_calls() as found:

        def noted(self: fx.Interpreter, node: fx.Node) -> Any:
            value = run(self, node)
            if node.op == "placeholder":
                found.append(len(value))
            return value

        monkeypatch.setattr(fx.Interpreter, "run_node", noted)
        yield found
