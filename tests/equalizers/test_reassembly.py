"""Splitting and merging of channels."""

from dataclasses import replace

import torch
from support.language_model import captured_model, tokens

from gdfq.equalizers.reassembly import Reassembly
from gdfq.functional.grid import Bits
from gdfq.functional.reassembly import merged_pairs, new_channels, reassembled
from gdfq.graph import operators
from gdfq.graph.tensors import tensors_of
from gdfq.student.scheme import LayerBits, Scheme

_SCHEME = Scheme(Bits.parse("w8a4"), "tokens", (LayerBits("last", None),))


def test_channels_by_hand() -> None:
    """Channel 0 stands out three times; 1 and 2 are alike, as are 3 and 4."""
    x = torch.tensor([[6.0, 1.0, 1.1, 2.0, 2.0], [-5.0, 0.5, 0.4, -1.0, -1.0]])
    weight = torch.tensor([[1.0, 2.0, 2.1, 3.0, 3.0]])
    found = new_channels(x, weight, 2.0)
    torch.testing.assert_close(found.columns, torch.tensor([[1.0, 4.1, 1.0, 6.0, 1.0]]))
    expected = torch.tensor([[2.0, 1.05, 2.0, 2.0, 2.0], [-5 / 3, 0.45, -5 / 3, -1.0, -5 / 3]])
    torch.testing.assert_close(reassembled(x, found.first, found.second, found.shares), expected)


def test_pairs_of_least_distance_are_merged_once() -> None:
    x = torch.tensor([[1.0, 1.0, 5.0, 4.9, 9.0, 0.0]])
    weight = torch.tensor([[1.0, 1.0, 2.0, 1.0, 7.0, 3.0]])
    # Distances to 1 and 3: of 0: 0 and 0; of 2: 4 and 0.1.
    assert merged_pairs(x, weight, torch.ones(6, dtype=torch.bool), 2) == [(0, 1), (2, 3)]
    assert merged_pairs(x, weight, torch.ones(6, dtype=torch.bool), 1) == [(0, 1)]
    assert merged_pairs(x, weight, torch.tensor([True] + [False] * 5), 3) == []


def test_layer_is_the_same_in_float64_where_merged_columns_are_equal() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(50, 12, generator=draw, dtype=torch.float64)
    x[:, 3] *= 20
    weight = torch.randn(6, 12, generator=draw, dtype=torch.float64)
    weight[:, 5:] = weight[:, 5:6]  # whatever is merged of these is exact
    found = new_channels(x, weight, float(x.abs().max()) / 3)
    actual = reassembled(x, found.first, found.second, found.shares)
    assert float(actual.abs().max()) <= float(x.abs().max()) / 3 + 1e-9
    torch.testing.assert_close(actual @ found.columns.mT, x @ weight.mT, atol=1e-9, rtol=1e-9)


def test_width_stays_and_threshold_of_all_changes_nothing() -> None:
    x, weight = torch.randn(9, 8), torch.randn(3, 8)
    found = new_channels(x, weight, float(x.abs().max()))
    assert torch.equal(reassembled(x, found.first, found.second, found.shares), x)
    assert torch.equal(found.columns, weight)


def test_model_is_reassembled_where_that_lowers_the_error() -> None:
    teacher, given = captured_model(), tokens(count=4, length=20)
    planted = {name: tensor.clone() for name, tensor in tensors_of(teacher.network).items()}
    planted["blocks.1.norm.weight"].data[3] *= 20
    teacher = replace(teacher, network=torch.fx.GraphModule(planted, teacher.network.graph))
    changed = Reassembly().equal(teacher, _SCHEME, [given], 0)
    names = [operators.name_of(node) for node in changed.network.graph.nodes]
    assert operators.REASSEMBLED in names
    with torch.no_grad():
        expected, actual = teacher.network(given), changed.network(given)
    assert actual.shape == expected.shape
    assert Reassembly((1.0,)).equal(teacher, _SCHEME, [given], 0).network(given).equal(expected)
