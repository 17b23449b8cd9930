"""Scales of tokens and of blocks of columns."""

import pytest
import torch
from support.language_model import captured_model, tokens

from gdfq.errors import UsageError
from gdfq.functional.grid import (
    Bits,
    Layout,
    block_size,
    dequantize,
    fake_quantize_tokens,
    tokens_straight_through,
)
from gdfq.quantizers.family import LSQ, TOKENS
from gdfq.quantizers.lsq import LearnedWeight
from gdfq.quantizers.tokens import BlockWeight
from gdfq.student.assignment import check_family
from gdfq.student.build import build_student
from gdfq.student.freeze import freeze
from gdfq.student.scheme import LayerBits, Scheme, with_default_layer_bits


def test_each_token_has_a_scale_of_its_own() -> None:
    x = torch.tensor([[[7.0, 3.4, -1.6, 0.0]], [[0.07, 0.034, -0.016, 0.0]], [[0.0] * 4]])
    expected = torch.tensor([[[7.0, 3.0, -2.0, 0.0]], [[0.07, 0.03, -0.02, 0.0]], [[0.0] * 4]])
    torch.testing.assert_close(fake_quantize_tokens(x, 4), expected)


def test_rounding_of_tokens_passes_the_gradient() -> None:
    x = torch.randn(2, 3, 8, requires_grad=True)
    weight = torch.randn(2, 3, 8)
    (tokens_straight_through(x, 4) * weight).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, weight)


@pytest.mark.parametrize(
    ("columns", "most", "size"), [(128, 64, 64), (172, 64, 58), (64, 64, 64), (10, 64, 10)]
)
def test_blocks_are_as_equal_as_they_can_be(columns: int, most: int, size: int) -> None:
    assert block_size(columns, most) == size


def test_codes_of_blocks_have_the_scales_of_their_blocks() -> None:
    codes = torch.ones(2, 5, dtype=torch.int8)
    scale = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    expected = torch.tensor([[1.0, 1, 1, 2, 2], [3, 3, 3, 4, 4]])
    torch.testing.assert_close(dequantize(codes, scale, torch.zeros(2, 2), 4), expected)


def test_block_weight_is_its_columns_quantized_apart() -> None:
    weight = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    whole = BlockWeight(weight, 3, Layout.ROWS, block=5)
    parts = [LearnedWeight(p, 3, Layout.ROWS, symmetric=True) for p in weight.split(5, 1)]
    expected = torch.cat([part(weight) for part in parts], 1)
    torch.testing.assert_close(whole(weight), expected)
    frozen = whole.quantized(weight)
    assert frozen.codes.shape == (6, 10)
    assert frozen.scale.shape == (6, 2)
    torch.testing.assert_close(
        dequantize(frozen.codes, frozen.scale, frozen.zero_point, 3), expected
    )


@pytest.mark.parametrize("columns", [10, 7])  # blocks of 5 and 5; of 4 and 3
def test_fitted_blocks_compensate_one_another(columns: int) -> None:
    """The outputs change by a third of what rounding to nearest changes them by, or less.

    With compensation alone, on the first scales, it is 0.47 and 0.42.
    """
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(6, columns, generator=draw)
    x = torch.randn(200, columns, generator=draw) + 2 * torch.randn(200, 1, generator=draw)
    inputs = (x.mT @ x / 200).double()[None]
    nearest = BlockWeight(weight, 3, Layout.ROWS, block=5)
    fitted = BlockWeight(torch.zeros(6, columns), 3, Layout.ROWS, block=5)
    fitted.fit_(weight, inputs, torch.tensor([1e-6], dtype=torch.float64))
    errors = [((x @ (q(weight) - weight).mT) ** 2).mean().item() for q in (fitted, nearest)]
    assert errors[0] < 0.36 * errors[1]
    frozen = fitted.quantized(weight)
    found = dequantize(frozen.codes, frozen.scale, frozen.zero_point, 3)
    torch.testing.assert_close(found, fitted(weight))


def test_last_block_may_be_smaller() -> None:
    weight = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    whole = BlockWeight(weight, 8, Layout.ROWS, block=3)  # blocks of 3, 3 and 1
    frozen = whole.quantized(weight)
    assert frozen.scale.shape == (3, 3)
    found = dequantize(frozen.codes, frozen.scale, frozen.zero_point, 8)
    assert float((found - weight).abs().max()) < 0.02


@pytest.mark.parametrize("block", [None, 8])
@pytest.mark.parametrize("bits", ["w4a4", "w4a16"])
def test_frozen_model_computes_what_its_student_does(bits: str, block: int | None) -> None:
    teacher = captured_model()
    scheme = Scheme(Bits.parse(bits), "tokens", (LayerBits("last", None),), group_size=block)
    student = build_student(teacher, scheme, quantizers=TOKENS)
    network, given = freeze(student), tokens(length=9)
    with torch.no_grad():
        torch.testing.assert_close(network(given), student(given), atol=1e-4, rtol=1e-4)
        assert float((network(given) - teacher.network(given)).abs().max()) > 0.1
    quantized = [layer.bits for layer in network.layers]
    assert quantized == [4] * 14 + [None]
    rounded = {n for n in network.graph.nodes if n.target is fake_quantize_tokens}
    # Queries, keys and values read one rounded tensor, as do both parts of the gated layers.
    assert len(rounded) == (0 if bits == "w4a16" else 8)


def test_head_stays_float_unless_it_is_named() -> None:
    bits = Bits.parse("w4a8")
    assert with_default_layer_bits((), bits, "tokens") == (LayerBits("last", None),)
    assert with_default_layer_bits((LayerBits("last", 8),), bits, "tokens") == (
        LayerBits("last", 8),
    )


def test_family_and_placement_must_be_of_one_kind() -> None:
    bits = Bits.parse("w4a8")
    with pytest.raises(UsageError, match="Use recipe 'text'"):
        check_family(Scheme(bits, "tokens"), LSQ)
    with pytest.raises(UsageError, match="any other recipe"):
        check_family(Scheme(bits, "full"), TOKENS)


@pytest.mark.parametrize(
    ("bits", "placement", "block", "message"),
    [
        ("w4a16", "full", None, r"activations of 16 bits are for .* Use for instance w4a8\.$"),
        ("w4a8", "full", 32, "groups of columns are for .* instance w4a8 without a group size"),
        ("w4a8", "tokens", 1, "two columns or more"),
        ("wfp4afp8", "tokens", None, "have integer grids"),
    ],
)
def test_scheme_refuses_what_does_not_go_together(
    bits: str, placement: str, block: int | None, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        Scheme(Bits.parse(bits), placement, group_size=block)  # type: ignore[arg-type]
