"""Grids with zero points of 0, and one grid for a concatenation and its inputs."""

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from support import networks
from support.small_runs import same, state
from torch import Tensor, nn

import gdfq
from gdfq.deploy.target import Carrier, Job, Proof, Target
from gdfq.errors import UsageError
from gdfq.functional.grid import (
    Bits,
    Layout,
    code_bounds,
    dequantize,
    fake_quantize,
    symmetric_grid,
    weight_grid,
)
from gdfq.graph.capture import Captured, capture
from gdfq.plan.resolve import resolve
from gdfq.quantizers.base import QuantizedTensor
from gdfq.quantizers.family import ADAROUND, LSQ, MINMAX, QuantizerFamily
from gdfq.quantizers.lsq import LearnedRange, best_weight_grid
from gdfq.quantizers.minmax import MovingRange
from gdfq.recipes import find_recipe
from gdfq.sources.base import Batch
from gdfq.sources.given import GivenImages
from gdfq.sources.pool import ImagePool
from gdfq.student.build import build_student
from gdfq.student.freeze import freeze, rescaled
from gdfq.student.integer_network import IntegerNetwork
from gdfq.student.placement import activation_bits, joined_groups, layer_input_bits
from gdfq.student.scheme import GridRules, Scheme
from gdfq.tuning.calibrate import calibrate_

ALL_RULES = GridRules(symmetric_weights=True, symmetric_activations=True, one_grid_for_joins=True)
JOINS = GridRules(one_grid_for_joins=True)


def frozen(
    teacher: Captured, scheme: Scheme, quantizers: QuantizerFamily = LSQ, images: int = 16
) -> IntegerNetwork:
    student = build_student(teacher, scheme, quantizers=quantizers)
    x = networks.images(images)
    calibrate_(student, [Batch((x,), None, None)], steps=1)
    return freeze(student)


def nonzero(network: IntegerNetwork) -> list[str]:
    """Names of the weights and activations with zero points other than 0."""
    found = [weight.name for weight in network.weights if weight.zero_point.any()]
    return found + [grid.name for grid in network.activations if grid.zero_point.any()]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_symmetric_grid_has_its_last_code_at_the_farther_end(bits: int) -> None:
    low, high = torch.tensor([-1.0, -6.0, 0.0, 0.0]), torch.tensor([2.0, 3.0, 6.0, 0.0])
    scale, zero_point = symmetric_grid(low, high, bits)
    _, last = code_bounds(bits)
    expected = torch.tensor([2.0 / last, 6.0 / last, 6.0 / last, 1.0])
    torch.testing.assert_close(scale, expected)
    assert not zero_point.any()
    assert torch.equal(weight_grid(low, high, bits, symmetric=True)[0], scale)


ENDS = st.tuples(st.floats(-10, 10, width=32), st.floats(-10, 10, width=32)).map(sorted)


@given(ends=ENDS, bits=st.integers(2, 8))
@example(ends=[9.5, 10.0], bits=6)  # far from 0: the widened grid has z = -32
@example(ends=[-1.0, 0.5], bits=7)
def test_products_with_weights_of_up_to_7_bits_fit_into_16_bits_in_pairs(
    ends: list[float], bits: int
) -> None:
    low, high = map(torch.tensor, ends)
    scale, zero_point = weight_grid(low, high, bits)
    reach = max(abs(code - float(zero_point)) for code in code_bounds(bits))
    assert 2 * 255 * reach <= 2**15 - 1 if bits < 8 else reach <= 128
    assert not zero_point or bits < 7
    rounded = fake_quantize(torch.stack([low, high]), scale, zero_point, bits)
    assert ((rounded - torch.stack([low, high])).abs() <= 1.001 * scale).all()


def test_grid_of_7_bits_is_symmetric() -> None:
    scale, zero_point = weight_grid(torch.tensor(-1.0), torch.tensor(0.5), 7)
    assert float(scale) == pytest.approx(1 / 63)
    assert float(zero_point) == 0


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_symmetric_weight_grid_is_found_by_least_error(bits: int) -> None:
    """No other scale of a fine search has a lower error."""
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    scale, zero_point = best_weight_grid(weight, bits, Layout.ROWS, symmetric=True)
    assert not zero_point.any()

    def error(scales: Tensor) -> Tensor:
        codes = (weight / scales).round().clamp(*code_bounds(bits))
        return (codes * scales - weight).abs().pow(2.4).sum(1)

    full, _ = symmetric_grid(weight.amin(1, keepdim=True), weight.amax(1, keepdim=True), bits)
    least = torch.stack([error(full * share) for share in torch.linspace(0.21, 1, 400)]).amin(0)
    assert (error(scale) <= 1.03 * least).all()


@pytest.mark.parametrize("quantizers", [LSQ, MINMAX, ADAROUND], ids=lambda family: family.name)
@pytest.mark.parametrize("name", ["Branches", "Preactivation"])
def test_all_zero_points_of_a_symmetric_scheme_are_zero(
    name: str, quantizers: QuantizerFamily
) -> None:
    """Batch norms with negative factors, clamps and residuals included."""
    teacher = networks.captured(name)
    free = frozen(teacher, Scheme(Bits(4, 8), "full"), quantizers)
    assert any(weight.zero_point.any() for weight in free.weights)
    assert any(grid.zero_point.any() for grid in free.activations)
    network = frozen(teacher, Scheme(Bits(4, 8), "full", grids=ALL_RULES), quantizers)
    assert not nonzero(network)
    x = networks.images(16)
    expected = teacher.network(x)
    error, free_error = (float((found(x) - expected).norm()) for found in (network, free))
    assert error < 2 * free_error


def test_mirrored_codes_keep_a_zero_point_of_zero() -> None:
    """Channel 0 may be mirrored around 0; channel 1 has the lowest code, and channel 2 z = 1."""
    codes = torch.tensor([[-7, 3], [-8, 3], [-7, 3]], dtype=torch.int8)
    zero_point = torch.tensor([[0.0], [0.0], [1.0]])
    tensor = QuantizedTensor(codes, torch.ones(3, 1), zero_point, 4)
    mirrored = rescaled(tensor, torch.full((3, 1), -2.0))
    assert mirrored.codes.tolist() == [[7, -3], [7, -4], [6, -4]]
    assert mirrored.zero_point.flatten().tolist() == [0, -1, -2]
    values, expected = (
        dequantize(t.codes, t.scale, t.zero_point, t.bits) for t in (mirrored, tensor)
    )
    assert torch.equal(values, -2 * expected)


@pytest.mark.parametrize("kind", [LearnedRange, MovingRange])
@pytest.mark.parametrize(("limits", "end"), [
    ((0.0, 6.0), 6.0), ((-0.5, 2.0), 2.0), ((-3.0, 1.0), -3.0), ((-1.0, 1.0), 1.0),
    ((-0.5, float("inf")), None), ((0.0, float("inf")), None),
])  # fmt: skip
def test_symmetric_grid_saturates_at_the_farther_limit(
    kind: type[LearnedRange | MovingRange], limits: tuple[float, float], end: float | None
) -> None:
    x = torch.linspace(max(limits[0], -4.0), min(limits[1], 4.0) if end is None else limits[1], 999)
    quantizer = kind(8)
    quantizer.limits, quantizer.symmetric = limits, True
    quantizer.observe_(x)
    scale, zero_point = quantizer.grid()
    assert float(zero_point) == 0
    if end is None:
        assert 127.5 * float(scale) > 0.9 * float(x.abs().max())
    else:
        assert abs(end) / float(scale) >= (127.5 if end < 0 else 126.5)
        assert 127.6 * float(scale) > 0.98 * abs(end)


class Dense(nn.Module):
    """Concatenations of concatenations, one of values on ten times the scale."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.c, self.d = nn.Conv2d(8, 4, 1), nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x).relu()
        b = 10 * self.b(a).relu()
        joined = torch.cat([a, b], 1)
        c = self.c(joined)
        return self.d(torch.cat([joined, torch.max_pool2d(c, 1)], 1)).relu().mean((2, 3))


@functools.cache
def dense() -> Captured:
    torch.manual_seed(0)
    return capture(Dense(), networks.images(1))


def test_concatenations_and_their_inputs_share_one_grid() -> None:
    teacher = dense()
    network = frozen(teacher, Scheme(Bits(8, 8), "full", grids=JOINS))
    grids = {grid.name: grid for grid in network.activations}
    joined = {"relu", "mul", "cat", "conv2d_2", "cat_1"}
    assert joined < set(grids)
    assert len({(float(grids[n].scale), float(grids[n].zero_point)) for n in joined}) == 1
    apart = frozen(teacher, Scheme(Bits(8, 8), "full"))
    own = {grid.name: float(grid.scale) for grid in apart.activations}
    assert len({own[name] for name in joined}) > 3
    # The grid covers the widest of them, which is read by the last concatenation.
    assert float(grids["cat"].scale) >= 0.8 * own["cat_1"]
    assert own["relu"] < 0.5 * own["cat_1"]


def test_activations_outside_of_concatenations_keep_their_own_grids() -> None:
    teacher = networks.captured("Residual")
    scheme = Scheme(Bits(4, 4), "full")
    nodes = list(teacher.network.graph.nodes)
    assert joined_groups(nodes, activation_bits(teacher, scheme)) == []
    networks_ = [frozen(teacher, replace(scheme, grids=rules)) for rules in (GridRules(), JOINS)]
    assert same(*map(state, networks_))


def test_concatenation_is_carried_with_the_bits_of_its_inputs() -> None:
    teacher = dense()
    bits = {
        rules: {node.name: k for node, k in activation_bits(teacher, scheme).items()}
        for rules in (GridRules(), JOINS)
        for scheme in [Scheme(Bits(4, 4), "full", grids=rules)]
    }
    assert bits[GridRules()]["cat_1"] == 4
    assert bits[JOINS]["cat_1"] == 8
    narrowed = layer_input_bits(teacher, Scheme(Bits(4, 4), "full", grids=JOINS))
    assert {node.name: k for node, k in narrowed.items()}["cat_1"] == 4
    network = frozen(teacher, Scheme(Bits(4, 4), "full", grids=JOINS))
    into_layers = [layer.input for layer in network.layers]
    assert [grid.bits for grid in into_layers if grid and "cat" in grid.name] == [4, 4]


@pytest.mark.parametrize("kind", [LearnedRange, MovingRange])
def test_shared_range_is_that_of_all_its_activations(
    kind: type[LearnedRange | MovingRange],
) -> None:
    small, large = torch.linspace(-1, 1, 999), torch.linspace(-1, 7, 999)
    shared, alone = kind(8), kind(8)
    shared.places, shared.observing = 2, True
    assert torch.equal(shared(small), small)  # the range is not known yet
    assert not shared.batches
    shared(large)
    alone.observe_(torch.cat([small, large]))
    assert int(shared.batches) == 1
    torch.testing.assert_close(shared.grid(), alone.grid(), rtol=0.02, atol=2)
    shared.observe_(small[:300], small[300:])  # a second batch, in two parts
    shared.observe_(large)
    assert int(shared.batches) == 2
    torch.testing.assert_close(shared.grid(), alone.grid(), rtol=0.02, atol=2)


def _unwritten(_job: Job) -> bytes:
    raise AssertionError


def _unproven(_job: Job, _path: Path) -> Proof:
    raise AssertionError


STRICT = Target(
    "strict", ".strict", "", _unwritten, _unproven,
    weights=Carrier("int8", symmetric=True), activations=Carrier("int8", symmetric=True),
    one_grid_for_joins=True,
)  # fmt: skip


def test_target_sets_the_rules_of_the_plan() -> None:
    assert resolve(dense(), None, "w4a8", target=STRICT).scheme.grids == ALL_RULES
    assert resolve(dense(), None, "w4a8", target="onnx").scheme.grids == GridRules()


def test_family_without_symmetric_weights_is_refused_before_the_run() -> None:
    recipe = find_recipe("quick")
    plain = replace(recipe.quantizers, symmetric_weight=None)
    with pytest.raises(UsageError, match="has no symmetric_weight"):
        gdfq.quantize(
            networks.captured("Residual"), networks.images(1), "w4a8",
            replace(recipe, quantizers=plain), target=STRICT,
        )  # fmt: skip


class Stopped(Exception):
    pass


def test_run_for_such_a_target_resumes_to_the_bit(tmp_path: Path) -> None:
    """Shared grids are written to a checkpoint and read again, also while the student trains."""
    recipe = replace(
        find_recipe("fast").with_steps(6), source=ImagePool(GivenImages(batch=8), 16, 8)
    )
    images = networks.images(16)

    def run(stop: int | None = None, folder: Path | None = None) -> IntegerNetwork:
        seen = 0

        def listen(_: object) -> None:
            nonlocal seen
            seen += 1
            if seen == stop:
                raise Stopped

        return gdfq.quantize(
            dense(), None, "w4a8", recipe, data=images, target=STRICT, listener=listen,
            checkpoints=folder, memory="1MiB",
        ).network  # fmt: skip

    whole = run()
    joined: Sequence[float] = [
        float(grid.scale) for grid in whole.activations if grid.name in {"relu", "mul", "cat"}
    ]
    assert len(joined) == 3
    assert len(set(joined)) == 1
    assert not nonzero(whole)
    with pytest.raises(Stopped):
        run(5, tmp_path)
    assert same(state(run(folder=tmp_path)), state(whole))
