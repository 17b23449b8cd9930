"""Evidence of layers, against values computed by hand or in another way."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from support import networks
from support.narrowing import instance, present
from torch import Tensor, nn

import gdfq
from gdfq.analysis.layers import BINS, Layers, measure_layers, saturation, sqnr
from gdfq.graph.batch_norms import fold_batch_norms
from gdfq.graph.capture import Captured
from gdfq.quantized import QuantizedNetwork
from gdfq.sources.pool import ImagePool
from gdfq.sources.spectral import SpectralSource


@pytest.fixture(scope="module")
def layers(teacher: Captured, quantized: QuantizedNetwork) -> Layers:
    return measure_layers(teacher, quantized.network, present(quantized.observations).images)


def test_sqnr_is_ten_times_the_logarithm_of_the_power_ratio() -> None:
    signal = torch.tensor([3.0, 4.0])  # power 25
    assert sqnr(signal, torch.tensor([3.0, 4.5])) == pytest.approx(20)  # error 0.25
    assert sqnr(signal, torch.tensor([0.0, 0.0])) == pytest.approx(0)
    assert sqnr(signal, signal) == 120
    assert sqnr(torch.zeros(2), torch.ones(2)) == -120
    assert sqnr(torch.tensor(10.0), torch.tensor(9.0)) == pytest.approx(20)


def test_large_maps_are_measured_in_parts_of_their_rows() -> None:
    rows = torch.arange(1.0, 4.0)[:, None].expand(3, 2**20)  # power 14 a column
    errors = torch.tensor([0.0, 0.0, 1.4**0.5])[:, None]
    assert sqnr(rows, rows + errors) == pytest.approx(10, abs=1e-5)
    grid = torch.tensor(1.0), torch.tensor(-2.0)  # codes -1, 0, 1 of 2 bits
    assert saturation(rows, *grid, 2) == 0
    assert saturation(rows + 1, *grid, 2) == pytest.approx(100 / 3)


def test_saturation_counts_codes_outside_the_grid() -> None:
    # 2 bits at scale 1 and zero point -2: codes -2..1 stand for 0..3, and 3.4 rounds to 3.
    x = torch.tensor([-1.0, -0.4, 0.0, 3.0, 3.4, 3.6, 9.0, 1.0])
    assert saturation(x, torch.tensor(1.0), torch.tensor(-2.0), 2) == pytest.approx(100 * 3 / 8)


def test_layer_evidence_matches_the_network(layers: Layers) -> None:
    found = {layer.name: layer for layer in layers.layers}
    assert list(found) == ["conv1", "conv2", "fc"]
    assert {name: layer.bits for name, layer in found.items()} == {"conv1": 3, "conv2": 3, "fc": 8}
    bits = {"conv1": 3 * 8 * 3 * 9, "conv2": 3 * 8 * 8 * 9, "fc": 8 * 8 * networks.CLASSES}
    for name, count in bits.items():
        assert found[name].share == pytest.approx(100 * count / sum(bits.values()))
    assert found["conv1"].activation is None  # placement relu leaves the input float
    assert found["conv2"].activation == "relu"
    assert all(present(layer.sensitivity) >= 0 for layer in layers.layers)


def test_layer_sqnr_matches_recorded_outputs(
    teacher: Captured, quantized: QuantizedNetwork, layers: Layers
) -> None:
    """The same numbers from forward passes that record the outputs of the layers."""
    batch = present(quantized.observations).images[:32]
    original = fold_batch_norms(teacher).network

    def recorded(network: nn.Module) -> list[tuple[Tensor, Tensor]]:
        seen = []

        class Recorder(torch.fx.Interpreter):
            def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
                value = super().call_function(target, args, kwargs)
                if "conv2d" in str(target) or "linear" in str(target):
                    seen.append((args[1], value))
                return value

        Recorder(network).run(batch)
        return seen

    for layer, (weight, output), (ours, now) in zip(
        layers.layers, recorded(original), recorded(quantized.network.module), strict=True
    ):
        ratio = weight.norm() / (weight - ours).norm()
        assert layer.weight_sqnr == pytest.approx(20 * math.log10(ratio), abs=1e-3)
        ratio = output.norm() / (output - now).norm()
        assert layer.output_sqnr == pytest.approx(20 * math.log10(ratio), abs=1e-3)


def test_layers_are_compared_with_the_channel_scales_of_the_student(teacher: Captured) -> None:
    """At 8 bits the weights are near those of the rescaled teacher and far from others."""
    recipe = gdfq.RECIPES["quick"]
    source = replace(
        instance(recipe.source, ImagePool), images=32, source=SpectralSource(16, 4), batch=8
    )
    recipe = replace(recipe, source=source).with_steps(8)
    quantized = gdfq.quantize(teacher, networks.images(1), "w8a8", recipe)
    seen = present(quantized.observations)
    ours = measure_layers(seen.teacher, quantized.network, seen.images).layers
    assert min(present(layer.weight_sqnr) for layer in ours) > 25
    unscaled = measure_layers(teacher, quantized.network, seen.images).layers
    assert min(present(layer.weight_sqnr) for layer in unscaled) < 20


def test_activation_evidence_has_grids_and_counts(
    layers: Layers, quantized: QuantizedNetwork
) -> None:
    first = layers.activations[0]
    assert (first.name, first.bits, first.low) == ("relu", 4, 0)
    assert first.minimum == 0
    assert first.maximum > 0
    assert layers.activation_counts.shape == (len(layers.activations), BINS)
    numbers = 8 * 8 * 8 * min(32, len(present(quantized.observations).images))
    assert layers.activation_counts[0].sum() == numbers
    assert layers.weight_counts[0].sum() == 8 * 3 * 9
    assert layers.activation_ends[0].tolist() == pytest.approx([first.minimum, first.maximum])
