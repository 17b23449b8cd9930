"""The numbers of the evidence, against values computed by hand or independently."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from support import networks

import gdfq
from gdfq.analysis import images, observations, predictions, sensitivity
from gdfq.analysis.accuracy import Predictions
from gdfq.analysis.layers import BINS, measure_layers, saturation, sqnr
from gdfq.data.datasets import ArrayData
from gdfq.data.preprocessing import Preprocessing
from gdfq.execution.budget import MemoryBudget
from gdfq.functional import grid
from gdfq.functional.losses import relative_statistics_loss
from gdfq.graph.batch_norms import fold_batch_norms
from gdfq.graph.capture import capture
from gdfq.graph.memory import forward_bytes
from gdfq.graph.statistics import StatisticsNetwork
from gdfq.graph.walk import Walk
from gdfq.runs.diagnostics import gather, write_evidence
from gdfq.sources.base import Batch
from gdfq.sources.recent import Recent
from gdfq.sources.spectral import SpectralSource, natural_noise

UNIT = Preprocessing((0.0,), (1.0,))


@pytest.fixture(scope="module")
def labelled():
    draw = np.random.default_rng(0)
    pixels = torch.from_numpy(draw.integers(0, 256, (40, *networks.SHAPE), np.uint8))
    return pixels, torch.arange(40) % networks.CLASSES


@pytest.fixture(scope="module")
def quantized(teacher, tiny, labelled):
    return gdfq.quantize(
        teacher, networks.images(1), "w3a4", tiny, test=labelled, layer_bits=["fc=8"]
    )


@pytest.fixture(scope="module")
def layers(teacher, quantized):
    return measure_layers(teacher, quantized.network, quantized.observations.images)


def test_sqnr_is_ten_times_the_logarithm_of_the_power_ratio():
    signal = torch.tensor([3.0, 4.0])  # power 25
    assert sqnr(signal, torch.tensor([3.0, 4.5])) == pytest.approx(20)  # error 0.25
    assert sqnr(signal, torch.tensor([0.0, 0.0])) == pytest.approx(0)
    assert sqnr(signal, signal) == 120
    assert sqnr(torch.zeros(2), torch.ones(2)) == -120


def test_saturation_counts_codes_outside_the_grid():
    # 2 bits at scale 1 and zero point -2: codes -2..1 stand for 0..3, and 3.4 rounds to 3.
    x = torch.tensor([-1.0, -0.4, 0.0, 3.0, 3.4, 3.6, 9.0, 1.0])
    assert saturation(x, torch.tensor(1.0), torch.tensor(-2.0), 2) == pytest.approx(100 * 3 / 8)


def test_walk_computes_the_network_and_frees_values(teacher):
    batch = networks.images(3)
    walk = Walk(teacher.network)
    held = []
    for visit in walk.visits(batch):
        held.append(len(walk.env))
        last = visit
    assert last.value.equal(teacher.network(batch))
    assert max(held) < len(teacher.network.graph.nodes)


def test_layer_evidence_matches_the_network(layers):
    found = {layer.name: layer for layer in layers.layers}
    assert list(found) == ["conv1", "conv2", "fc"]
    assert {name: layer.bits for name, layer in found.items()} == {"conv1": 3, "conv2": 3, "fc": 8}
    bits = {"conv1": 3 * 8 * 3 * 9, "conv2": 3 * 8 * 8 * 9, "fc": 8 * 8 * networks.CLASSES}
    for name, count in bits.items():
        assert found[name].share == pytest.approx(100 * count / sum(bits.values()))
    assert found["conv1"].activation is None  # placement relu leaves the input float
    assert found["conv2"].activation == "relu"
    assert all(layer.sensitivity >= 0 for layer in layers.layers)


def test_layer_sqnr_matches_recorded_outputs(teacher, quantized, layers):
    """The same numbers from forward passes that record the outputs of the layers."""
    batch = quantized.observations.images[:32]
    original = fold_batch_norms(teacher).network

    def recorded(network):
        seen = []

        class Recorder(torch.fx.Interpreter):
            def call_function(self, target, args, kwargs):
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


def test_layers_are_compared_with_the_channel_scales_of_the_student(teacher):
    """At 8 bits the weights are near those of the rescaled teacher and far from others."""
    recipe = gdfq.RECIPES["quick"]
    source = replace(recipe.source, images=32, source=SpectralSource(16, 4), batch=8)
    recipe = replace(recipe, source=source).with_steps(8)
    quantized = gdfq.quantize(teacher, networks.images(1), "w8a8", recipe)
    seen = quantized.observations
    ours = measure_layers(seen.teacher, quantized.network, seen.images).layers
    assert min(layer.weight_sqnr for layer in ours) > 25
    unscaled = measure_layers(teacher, quantized.network, seen.images).layers
    assert min(layer.weight_sqnr for layer in unscaled) < 20


def test_activation_evidence_has_grids_and_counts(layers, quantized):
    first = layers.activations[0]
    assert (first.name, first.bits, first.low) == ("relu", 4, 0)
    assert first.minimum == 0
    assert first.maximum > 0
    assert layers.activation_counts.shape == (len(layers.activations), BINS)
    numbers = 8 * 8 * 8 * min(32, len(quantized.observations.images))
    assert layers.activation_counts[0].sum() == numbers
    assert layers.weight_counts[0].sum() == 8 * 3 * 9
    assert layers.activation_ends[0].tolist() == pytest.approx([first.minimum, first.maximum])


def test_sensitivity_is_higher_with_fewer_bits(teacher, tiny):
    batch = networks.images(8)
    folded = fold_batch_norms(teacher)

    def of(bits):
        network = gdfq.quantize(teacher, networks.images(1), bits, tiny).network
        return sensitivity.measure_sensitivity(folded, network, batch)

    coarse, fine = of("w2a2"), of("w8a8")
    assert coarse.kind == fine.kind == "divergence"
    assert coarse.by_layer.keys() == fine.by_layer.keys()
    assert all(coarse.by_layer[name] > 10 * fine.by_layer[name] for name in fine.by_layer)


def test_sensitivity_of_a_large_network_is_the_error_of_the_layer(teacher, quantized, monkeypatch):
    monkeypatch.setattr(sensitivity, "_MAX_OPERATIONS", 1)
    batch = networks.images(8)
    folded = fold_batch_norms(teacher)
    found = sensitivity.measure_sensitivity(folded, quantized.network, batch)
    assert found.kind == "error"
    # The first layer's input is float, so its error is that of its weight alone.
    weight = folded.network.get_parameter("conv1.folded_weight")
    bias = folded.network.get_parameter("conv1.folded_bias")
    ends = sensitivity.best_weight_grid(weight, 3, grid.Layout.ROWS)
    rounded = grid.fake_quantize(weight, *ends, 3)
    exact, other = (torch.conv2d(batch, w, bias, padding=1) for w in (weight, rounded))
    expected = float((exact - other).square().sum() / exact.square().sum())
    assert found.by_layer["conv2d"] == pytest.approx(expected, rel=1e-4)


def test_sensitivity_of_a_float_layer_is_none(teacher, tiny):
    result = gdfq.quantize(teacher, networks.images(1), "w4a4", tiny, layer_bits=["conv2=float"])
    found = {
        layer.name: layer
        for layer in measure_layers(teacher, result.network, networks.images(4)).layers
    }
    assert found["conv2"].bits is found["conv2"].sensitivity is found["conv2"].weight_sqnr is None


def test_spread_is_one_for_unrelated_and_zero_for_equal_images():
    one = torch.randn(1, 3, 8, 8)
    assert images.spread(one.expand(10, -1, -1, -1)) == 0
    # Two images ±a: every pixel varies by a², and so do all numbers together.
    assert images.spread(torch.cat([one, -one])) == pytest.approx(1)
    # x ± a around a pattern: V_b = 1, V = 1 + 9.
    pattern = torch.tensor([3.0, -3.0])
    pair = torch.stack([pattern + 1, pattern - 1])
    assert images.spread(pair) == pytest.approx((1 / 10) ** 0.5)
    assert images.spread(torch.zeros(3, 2)) == 0


def test_distance_of_pairs_matches_hand_computed_values():
    features = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0], [6.0, 8.0]])
    # Squares: 25, 0, 100, 25, 25, 100.
    assert images.distance_of_pairs(features) == pytest.approx((275 / 6) ** 0.5)
    assert images.distance_of_pairs(features[:1]) == 0
    within = images.within_classes(features, torch.tensor([0, 1, 0, 1]))
    # Pairs of one class: 0 and 25.
    assert within == pytest.approx((12.5 / (275 / 6)) ** 0.5)
    assert images.within_classes(features, torch.arange(4)) is None


def test_coverage_counts_predicted_classes():
    logits = torch.tensor([[9.0, 0, 0], [9, 0, 0], [0, 9, 0], [9, 0, 0]])
    found = images.coverage(logits, torch.tensor([0, 1, 1, 2]))
    assert (found.predicted, found.possible, found.as_labelled) == (2, 3, 50)
    assert found.confidence == pytest.approx(100 * math.exp(9) / (math.exp(9) + 2), abs=1e-4)


def test_clipped_matches_a_hand_computed_share():
    pixels = torch.tensor([-0.1, 0.0, 0.5, 1.001, 1.1]).view(5, 1, 1, 1)
    assert images.clipped(pixels, UNIT) == pytest.approx(40)  # 1.001 rounds to white
    shifted = (pixels - 0.5) / 0.25
    assert images.clipped(shifted, Preprocessing((0.5,), (0.25,))) == pytest.approx(40)


def test_by_class_chooses_four_images_of_each_class():
    labels = torch.tensor([2, 1, 2, 2, 1, 2, 2, 0])
    assert images.by_class(labels, 8) == [7, 1, 4, 0, 2, 3, 5]
    assert images.by_class(None, 3) == [0, 1, 2]
    many = images.by_class(torch.arange(400) % 100, 400)
    assert len(many) == 40


def test_thumbnails_are_small_and_empty_for_other_inputs():
    assert images.thumbnails(torch.zeros(2, 3, 128, 64), UNIT).shape == (2, 3, 64, 32)
    assert images.thumbnails(torch.full((1, 1, 2, 2), 0.5), UNIT).tolist() == [[[[128] * 2] * 2]]
    for inputs in (torch.zeros(2, 5, 8, 8), torch.zeros(2, 7)):
        assert images.thumbnails(inputs, UNIT).size == 0


def test_distances_do_not_depend_on_the_batch(teacher):
    batch, labels = networks.images(7), torch.arange(7) % networks.CLASSES
    whole = images.measure_images(teacher, batch, labels, UNIT)
    three = MemoryBudget(4 * 3 * forward_bytes(teacher.network.graph))
    parts = images.measure_images(teacher, batch, labels, UNIT, three)
    network = StatisticsNetwork(teacher)
    _, seen = network(batch)
    for index, (a, b) in enumerate(zip(whole.distances, parts.distances, strict=True)):
        assert a.synthetic == pytest.approx(b.synthetic, rel=1e-4)
        expected = relative_statistics_loss([seen[index]], [network.stored[index]])
        assert a.synthetic == pytest.approx(float(expected), rel=1e-4)
    assert [distance.name for distance in whole.distances] == ["bn1", "bn2"]


def test_images_of_noise_have_the_distances_of_noise(teacher):
    """And the diversity of noise."""
    noise = images._noise(64, teacher)["natural"]
    found = images.measure_images(teacher, noise, None, UNIT)
    assert all(d.synthetic == pytest.approx(d.natural) for d in found.distances)
    assert found.diversity.features == pytest.approx(1)
    assert found.classes is found.diversity.within_class is None


def test_paired_drop_matches_a_hand_computed_error():
    # 2 points of 1000, 30 - 10; with one more of each 31 and 11 of 1002.
    drop, error = predictions.paired_drop(30, 10, 1000)
    assert drop == pytest.approx(2)
    assert error == pytest.approx(100 * math.sqrt((42 / 1002 - (20 / 1002) ** 2) / 1002))
    # No change in 40 images: the error is not 0.
    assert predictions.paired_drop(0, 0, 40) == (0, pytest.approx(100 * math.sqrt(2) / 42))


def test_calibration_matches_a_hand_computed_error():
    predicted = Predictions(torch.tensor([0, 0, 0, 0]), torch.tensor([0.95, 0.97, 0.5, 0.52]))
    found = predictions.calibration(predicted, torch.tensor([0, 1, 0, 0]))
    # Bins of 1/15: half of {0.95, 0.97} correct; 0.5 and 0.52 both in (7/15, 8/15] and correct.
    assert found.counts[14] == found.counts[7] == 2
    assert found.ece == pytest.approx(100 * (2 * abs(0.5 - 0.96) + 2 * abs(1 - 0.51)) / 4, abs=1e-4)
    sure = Predictions(torch.tensor([1]), torch.tensor([1.0]))
    assert predictions.calibration(sure, torch.tensor([1])).ece == 0


def test_changes_match_hand_computed_flips_and_confusions():
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    was = torch.tensor([0, 0, 1, 1, 0, 0])
    now = torch.tensor([1, 1, 1, 1, 1, 1])
    pixels = torch.zeros(6, 1, 4, 4, dtype=torch.uint8)
    sure = torch.ones(6)
    tested = observations.TestPredictions(
        ArrayData(pixels, labels), labels, Predictions(was, sure), Predictions(now, sure)
    )
    found = predictions.measure_changes(tested, UNIT)
    assert (found.lost, found.gained, found.still_wrong) == (2, 1, 1)
    assert (found.teacher, found.student) == (50, pytest.approx(100 / 3))
    assert [flip.index for flip in found.flips] == [0, 1, 4, 5]  # lost images first
    assert found.pictures.shape == (4, 1, 4, 4)
    assert [(c.label, c.prediction, c.teacher, c.student) for c in found.confusions] == [
        (0, 1, 1, 3),
        (2, 1, 0, 1),
    ]
    assert found.by_class == (
        (0, 3, pytest.approx(200 / 3), 0),
        (1, 2, 50, 100),
        (2, 1, 0, 0),
    )


def test_gather_measures_all_sections(teacher, quantized, tmp_path):
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


def test_gather_gives_the_reason_for_a_missing_section(teacher, quantized, monkeypatch):
    def fails(*_):
        raise RuntimeError("no memory\nat all")

    monkeypatch.setattr(gdfq.runs.diagnostics, "measure_layers", fails)
    evidence = gather(teacher, quantized)
    assert evidence.missing == {"layers": "RuntimeError: no memory"}
    assert set(evidence.sections) == {"trust", "images", "test"}
    nothing = gdfq.QuantizedNetwork(quantized.network, quantized.card)
    assert set(gather(teacher, nothing).missing) == {"trust", "layers", "images", "test"}


@pytest.mark.parametrize("name", ["Branches", "Shared", "Transposed"])
def test_gather_measures_other_networks(name, tiny):
    teacher = networks.captured(name)
    result = gdfq.quantize(teacher, networks.images(1), "w4a4", tiny, placement="full")
    assert gather(teacher, result).missing == {"test": "no labelled test images were given"}


def test_recent_holds_the_last_images(monkeypatch):
    recent = Recent(torch.device("cpu"))
    assert recent.inputs() is None
    for step in range(9):
        batch = torch.full((100, *networks.SHAPE), float(step))
        recent.see_(Batch((batch,), torch.arange(100), None))
    (seen,), labels = recent.inputs()
    assert len(seen) == len(labels) == 256
    assert seen[0].unique().tolist() == [8]  # the newest first
    assert seen[:, 0, 0, 0].unique().tolist() == [6, 7, 8]
    monkeypatch.setattr("gdfq.sources.recent._MAX_ELEMENTS", 5 * 3 * 8 * 8)
    (few,), _ = recent.inputs()
    assert len(few) == 5  # fewer where images are large


def test_noise_has_the_input_statistics_of_the_network():
    draw = torch.Generator().manual_seed(0)
    pixels = 120 + 60 * natural_noise(64, (3, 16, 16), SpectralSource(), draw)
    teacher = capture(networks.that_saw(pixels), pixels[:1])
    noise = images._noise(64, teacher)["white"]
    assert float(noise.mean()) == pytest.approx(120, abs=12)
    assert float(noise.std()) == pytest.approx(60, abs=12)
    (distance,) = images.measure_images(teacher, pixels, None, UNIT).distances
    assert distance.natural < 0.2
