"""The rotation of the residual stream, exact in float64."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import networks
from support.language_model import captured_model, in_float64, tiny_model, tokens, vocabulary

from gdfq.equalizers.hadamard import Hadamard
from gdfq.equalizers.structure import Structure, heads_of, product_of
from gdfq.errors import UsageError
from gdfq.functional.grid import Bits
from gdfq.functional.rotations import hadamard, random_factors, rotated
from gdfq.graph import operators, queries
from gdfq.graph.capture import Captured, capture
from gdfq.graph.tensors import tensors_of
from gdfq.student.scheme import Scheme

SCHEME = Scheme(Bits.parse("w4a4"), "tokens")


def test_hadamard_matrix_is_that_of_sylvester() -> None:
    expected = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])
    torch.testing.assert_close(hadamard(4) * 2, expected.double())


@pytest.mark.parametrize("size", [1, 8, 12, 21, 172])
def test_rotation_is_orthogonal_and_the_product_of_its_factors(size: int) -> None:
    left, right = random_factors(size, torch.Generator().manual_seed(0))
    whole = torch.kron(left, right)
    torch.testing.assert_close(whole @ whole.mT, torch.eye(size, dtype=torch.float64))
    assert len(right) == {1: 1, 8: 8, 12: 4, 21: 1, 172: 4}[size]
    x = torch.randn(2, 3, size, dtype=torch.float64)
    torch.testing.assert_close(rotated(x, left, right), x @ whole)


def test_structure_of_a_llama() -> None:
    structure = Structure.of(captured_model().network.graph)
    assert structure.width == 16
    names = [queries.layer_name(writer) for writer in structure.writers]
    assert names == [f"blocks.{i}.{part}" for i in (0, 1) for part in ("attention.o", "gated.down")]
    readers = [[queries.layer_name(r) for r in norm.readers] for norm in structure.norms]
    assert readers == [
        [f"blocks.0.attention.{n}" for n in "qkv"],
        [f"blocks.0.gated.{n}" for n in ("gate", "up")],
        [f"blocks.1.attention.{n}" for n in "qkv"],
        [f"blocks.1.gated.{n}" for n in ("gate", "up")],
        ["head"],
    ]
    o, down = structure.writers[:2]
    heads, product = heads_of(o), product_of(down)
    assert heads is not None
    assert (queries.layer_name(heads.values), heads.size) == ("blocks.0.attention.v", 4)
    assert product is not None
    assert queries.layer_name(product.factor) == "blocks.0.gated.up"
    assert heads_of(down) is None
    assert product_of(o) is None


def test_rotated_model_is_the_same_in_float64() -> None:
    teacher = in_float64(captured_model())
    given = tokens(count=3, length=20, seed=4)
    changed = Hadamard().equal(teacher, SCHEME, [given], 0)
    with torch.no_grad():
        expected, actual = teacher.network(given), changed.network(given)
    assert float((actual - expected).abs().max() / expected.abs().max()) < 1e-5
    nodes = list(changed.network.graph.nodes)
    assert sum(operators.name_of(node) == operators.ROTATED for node in nodes) == 2
    names = [queries.layer_name(node) for node in queries.layers_of(changed.network)]
    assert names == [queries.layer_name(node) for node in queries.layers_of(teacher.network)]


def test_rotation_spreads_an_outlier_of_the_stream() -> None:
    teacher = captured_model()
    tensors = tensors_of(teacher.network)
    with torch.no_grad():
        planted = {n: t.clone() for n, t in tensors.items()}
        for name, tensor in planted.items():
            if name.endswith(("o.weight", "down.weight")):
                tensor[3] *= 30  # what is written into channel 3
    outlying = replace(teacher, network=torch.fx.GraphModule(planted, teacher.network.graph))
    given = tokens(count=3, length=20, seed=4)
    changed = Hadamard().equal(outlying, SCHEME, [given], 0)

    def peak(found: Captured) -> float:
        """Largest share of the maximum in the norm of what the last gate reads, √C at most."""
        layer = [n for n in queries.layers_of(found.network) if "gate" in queries.layer_name(n)][-1]
        network = torch.fx.GraphModule(found.network, found.network.graph)
        values: dict[Any, Any] = {}
        interpreter = torch.fx.Interpreter(network)
        run = interpreter.run_node
        interpreter.run_node = lambda n: values.setdefault(n, run(n))  # type: ignore[method-assign]
        interpreter.run(given)
        x = values[queries.input_of(layer)]
        return float((x.abs().amax(-1) / x.square().mean(-1).sqrt()).mean())

    assert peak(outlying) > 1.2 * peak(changed)


def test_network_of_another_form_is_refused() -> None:
    with pytest.raises(UsageError, match="needs a language model whose residual stream"):
        Hadamard().equal(networks.captured("Transformer"), SCHEME, [], 0)


class _OtherLayout(torch.nn.Module):
    """Attention whose heads are the last dimension: channel d of head h is number d · heads + h."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        self.layout = layout
        self.q, self.k, self.v, self.o = (torch.nn.Linear(16, 16, bias=False) for _ in "qkvo")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k = (layer(x).unflatten(-1, (4, 4)).transpose(1, 2) for layer in (self.q, self.k))
        values = self.v(x).unflatten(-1, (4, 4))
        values = values.permute(0, 3, 1, 2) if "values" in self.layout else values.transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q, k, values, is_causal=True)
        order = (0, 2, 3, 1) if "output" in self.layout else (0, 2, 1, 3)
        found: torch.Tensor = self.o(mixed.permute(*order).reshape(x.shape))
        return found


@pytest.mark.parametrize("layout", ["usual", "values", "output", "values and output"])
def test_heads_in_any_layout_are_rotated_exactly(layout: str) -> None:
    """There are as many heads as channels of one, so that no size tells them apart."""
    model = tiny_model()
    for block in model.blocks:
        block.attention = _OtherLayout(layout)
    captured = in_float64(capture(model.eval(), tokens(), vocabulary=vocabulary()))
    o = Structure.of(captured.network.graph).writers[0]
    assert (heads_of(o) is None) == (layout != "usual")
    given = tokens(count=3, length=20, seed=4)
    changed = Hadamard().equal(captured, SCHEME, [given], 0)
    with torch.no_grad():
        expected, actual = captured.network(given), changed.network(given)
    assert float((actual - expected).abs().max() / expected.abs().max()) < 1e-5
