"""Floating-point grids from the option to the saved network."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from support import networks
from support.small_runs import quantized_by_fast, same, small, state

import gdfq
from gdfq import TARGETS, GdfqError, UsageError
from gdfq.analysis.layers import measure_layers
from gdfq.deploy.card import Card
from gdfq.deploy.safetensors import from_safetensors, to_safetensors
from gdfq.deploy.target import Carrier
from gdfq.files.plain_values import fingerprint, frozen_values
from gdfq.functional.float_grid import E2M1, E3M4, E4M3, dequantize_float, fake_quantize_float
from gdfq.functional.grid import Bits
from gdfq.graph.capture import Captured
from gdfq.plan.method import resolve_method
from gdfq.plan.resolve import resolve
from gdfq.quantized import QuantizedNetwork
from gdfq.quantizers.base import QuantizedTensor, WeightQuantizer
from gdfq.quantizers.family import ADAROUND, LSQ, MINMAX, QuantizerFamily
from gdfq.recipes import RECIPES
from gdfq.sources.base import Batch
from gdfq.student.assignment import check_scheme
from gdfq.student.build import build_student
from gdfq.student.freeze import freeze, rescaled
from gdfq.student.integer_network import IntegerNetwork
from gdfq.student.scheme import GridRules, LayerBits, Scheme
from gdfq.tuning.calibrate import calibrate_

FLOATS = ("wfp8afp8", "wfp4afp8", "wfp4afp4")
MIXED = ("wfp4a8", "w4afp8")


@pytest.fixture(scope="module")
def teacher() -> Captured:
    return networks.captured("Residual")


@pytest.fixture(scope="module", params=(*FLOATS, *MIXED))
def quantized(request: pytest.FixtureRequest, teacher: Captured) -> QuantizedNetwork:
    """A network after two updates, for each kind of grids."""
    return quantized_by_fast(teacher, request.param)


@pytest.mark.parametrize("text", [*FLOATS, *MIXED, "w4a8"])
def test_bits_are_written_as_they_are_read(text: str) -> None:
    assert str(Bits.parse(text)) == text
    assert Bits.parse("WFP4afp8") == Bits(4, 8, float_weights=True, float_activations=True)


@pytest.mark.parametrize("text", ["wfp3a8", "w8afp6", "wf4a8", "fp4fp8"])
def test_bits_that_no_format_has_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="wfp8afp8"):
        Bits.parse(text)


def test_integer_bits_and_rules_are_identified_as_before() -> None:
    assert fingerprint(Bits(4, 8)) != fingerprint(Bits(4, 8, float_weights=True))
    assert fingerprint(GridRules()) != fingerprint(GridRules(formats=(E4M3,)))
    assert frozen_values(Bits(4, 8)) == {"class": "Bits", "weights": 4, "activations": 8}
    assert "formats" not in frozen_values(GridRules())


def test_layers_have_bits_that_formats_have() -> None:
    bits = Bits.parse("wfp4afp8")
    Scheme(bits, "full", (LayerBits("first", 8), LayerBits("last", None)))
    with pytest.raises(UsageError, match="first=8"):
        Scheme(bits, "full", (LayerBits("first", 6),))
    with pytest.raises(UsageError, match="4 or 8 bits, or float"):
        resolve_method("wfp8afp8", layer_bits=["last=3"])


def test_family_without_floating_point_grids_is_refused_before_a_run(teacher: Captured) -> None:
    for bits in ("wfp8a8", "w8afp8"):
        with pytest.raises(UsageError, match="Use a recipe that learns its grids"):
            check_scheme(teacher, Scheme(Bits.parse(bits), "full"), MINMAX)
    with pytest.raises(UsageError, match="learns its grids"):
        resolve(teacher, None, "wfp8afp8", "paper", placement="full")


INTEGER_TARGETS = sorted(set(TARGETS) - {"pt2", "safetensors", "onnx-fp8", "compressed-tensors"})
"""The last one refuses all networks but language models, before it looks at their grids."""


@pytest.mark.parametrize("name", INTEGER_TARGETS)
def test_integer_target_refuses_floating_point_grids_before_a_run(
    name: str, teacher: Captured
) -> None:
    target = replace(TARGETS[name], runtime=None)
    for bits in ("wfp8a8", "w8afp8"):
        with pytest.raises(UsageError, match="floating-point grid of 8 bits"):
            resolve(teacher, None, bits, target=target)


def test_integer_target_refuses_a_finished_network(
    quantized: QuantizedNetwork, tmp_path: Path
) -> None:
    with pytest.raises(
        UsageError, match=r"floating-point grid.* --target onnx and other --bits, or"
    ):
        quantized.export(tmp_path / "q.onnx")
    assert not list(tmp_path.iterdir())


def test_target_chooses_the_formats(teacher: Captured) -> None:
    carrier = Carrier("float8", formats=(E4M3, E2M1))
    target = replace(TARGETS["safetensors"], name="mine", weights=carrier, activations=carrier)
    network = frozen(teacher, Scheme(Bits.parse("wfp4afp8"), "full", grids=target.grids))
    assert {weight.form for weight in network.weights} == {E2M1}
    assert {grid.form for grid in network.activations} == {E4M3}
    target.check_network(network, "full")
    with pytest.raises(UsageError, match=r"grid U?E3M. of 8 bits.* --target mine, or"):
        target.check_network(frozen(teacher, Scheme(Bits.parse("w4afp8"), "full")), "full")
    only_8 = replace(target, weights=Carrier("float8", formats=(E4M3,)))
    with pytest.raises(UsageError, match="a floating-point grid of 4 bits"):
        resolve(teacher, None, "wfp4afp8", target=only_8)


def frozen(teacher: Captured, scheme: Scheme, quantizers: QuantizerFamily = LSQ) -> IntegerNetwork:
    images = partial(networks.images, shape=tuple(teacher.input_shape))
    student = build_student(teacher, scheme, quantizers=quantizers)
    calibrate_(student, [Batch((images(16),), None, None)], steps=1)
    for module in student.modules():
        if isinstance(module, WeightQuantizer):
            module.settle_()
    x = images(9)
    y = student.eval()(x).detach()
    network = freeze(student)
    # The student computes in floats what the frozen network computes; another order of sums moves
    # single values to the next number.
    torch.testing.assert_close(network(x), y, rtol=0.1, atol=0.1 * float(y.abs().max()))
    return network


@pytest.mark.parametrize("family", [LSQ, ADAROUND], ids=lambda family: family.name)
@pytest.mark.parametrize("name", ["Residual", "Branches", "Shared", "Transposed", "Transformer"])
def test_frozen_student_has_the_grids_of_its_scheme(name: str, family: QuantizerFamily) -> None:
    teacher = networks.captured(name)
    network = frozen(teacher, Scheme(Bits.parse("wfp4afp8"), "full"), family)
    forms = [weight.form for weight in network.weights]
    assert forms
    assert all(form is not None and form.bits == 4 and form.signed for form in forms)
    assert {form.bits for g in network.activations if (form := g.form) is not None} == {8}
    biases = [layer.bias for layer in network.layers]
    assert all(bias is None or bias.is_floating_point() for bias in biases)


def test_network_computes_with_the_numbers_of_its_codes(quantized: QuantizedNetwork) -> None:
    """The integer network, from its codes and scales alone, by a walk over its graph."""
    network, x = quantized.network, networks.images(5)
    weights = {weight.node: weight for weight in network.weights}
    grids = {grid.node: grid for grid in network.activations}

    class Reference(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            if n in weights and (form := weights[n].form) is not None:
                return dequantize_float(weights[n].codes, weights[n].scale, form.name)
            if n in grids and (form := grids[n].form) is not None:
                (value,) = (self.env[source] for source in n.all_input_nodes[:1])
                return fake_quantize_float(value, grids[n].scale, form.name)
            return super().run_node(n)

    expected = Reference(network.module).run(x)
    bits = quantized.card.bits
    assert any(w.form is not None for w in weights.values()) == bits.float_weights
    assert any(g.form is not None for g in grids.values()) == bits.float_activations
    torch.testing.assert_close(network(x), expected)


def test_quantized_network_is_nearer_than_chance(
    quantized: QuantizedNetwork, teacher: Captured
) -> None:
    x = networks.images(32)
    y = teacher.network(x)
    error = float((quantized(x) - y).norm() / y.norm())
    assert error < {"wfp8afp8": 0.1, "wfp4afp4": 0.7}.get(str(quantized.card.bits), 0.5)


def test_saved_network_is_the_same_with_codes_packed_at_their_bits(
    quantized: QuantizedNetwork, tmp_path: Path
) -> None:
    quantized.save(tmp_path)
    loaded = gdfq.load(tmp_path)
    x = networks.images(5)
    assert torch.equal(loaded(x), quantized(x))
    assert loaded.card == quantized.card
    assert same(state(loaded.network), state(quantized.network))
    data = to_safetensors(quantized.network, quantized.card)
    weights = quantized.network.weights
    codes = sum(weight.codes.numel() * weight.bits // 8 for weight in weights)
    rest = sum(t.nbytes for t in quantized.network.tensors.values()) - sum(
        weight.codes.nbytes for weight in weights
    )
    header = int.from_bytes(data[:8], "little") + 8
    assert len(data) - header == pytest.approx(codes + rest, abs=4 * len(weights) + 8)


def test_codes_that_are_no_numbers_are_refused(teacher: Captured) -> None:
    rules = GridRules(formats=(E4M3, E3M4))
    network = frozen(teacher, Scheme(Bits.parse("wfp8afp8"), "full", grids=rules))
    weight = network.weights[0]
    assert weight.form is not None
    weight.codes[0, 0] = weight.form.largest_code + 1  # NaN, or infinity
    with pytest.raises(UsageError, match="damaged"):
        from_safetensors(to_safetensors(network, quantized_card(teacher)))


def quantized_card(teacher: Captured) -> Card:
    plan = resolve(teacher, None, "wfp8afp8")
    return plan.card(plan.scheme, 0)


def test_file_of_pt2_is_equal(quantized: QuantizedNetwork, tmp_path: Path) -> None:
    exported = quantized.export(tmp_path / "q.pt2")
    assert exported.inside.relative_error < 1e-5


def test_batch_norm_of_negative_scale_changes_the_sign_of_codes() -> None:
    # E2M1: 3 is 2, code 4; −6 is code 15.
    codes = torch.tensor([[4, 15], [4, 15], [4, 15]], dtype=torch.uint8)
    scale = torch.ones(3, 1)
    tensor = QuantizedTensor(codes, scale, torch.zeros(3, 1), 4, E2M1)
    found = rescaled(tensor, torch.tensor([[2.0], [-0.5], [0.0]]))
    assert found.form == E2M1
    values = dequantize_float(found.codes, found.scale, "E2M1")
    assert values.tolist() == [[4.0, -12.0], [-1.0, 3.0], [0.0, 0.0]]


def test_evidence_names_the_formats(quantized: QuantizedNetwork, teacher: Captured) -> None:
    found = measure_layers(teacher, quantized.network, networks.images(8))
    network = quantized.network
    shown = [layer.format for layer in found.layers]
    assert shown == [w.form.name if w.form else None for w in network.weights]
    assert {a.name: a.format for a in found.activations} == {
        g.name.rstrip("_"): g.form.name if g.form else None for g in network.activations
    }
    assert all(layer.sensitivity is not None for layer in found.layers)
    assert all(0 <= a.saturation < 50 for a in found.activations)


LEARNED = [name for name, recipe in RECIPES.items() if recipe.quantizers.float_weight]


@pytest.mark.parametrize("name", LEARNED)
def test_every_recipe_with_learned_grids_takes_floating_point_grids(name: str) -> None:
    recipe = small(RECIPES[name]).with_steps(1 if RECIPES[name].steps == 1 else 8)
    data = networks.images(16) if name == "real" else None
    try:
        found = gdfq.quantize(
            networks.captured("Residual"), networks.images(1), "wfp4afp4", recipe, data=data
        )
    except GdfqError as error:
        pytest.fail(str(error))
    forms = {weight.form.bits for weight in found.network.weights if weight.form is not None}
    assert forms == {4}
