"""Capture of modules as graphs, and what it refuses."""

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import networks
from torch import Tensor, nn

from gdfq import UsageError
from gdfq.graph import operators, queries, tracing
from gdfq.graph.capture import capture
from gdfq.graph.tensors import tensors_of


def test_captured_network_equals_the_module_for_any_batch_size(any_network: nn.Module) -> None:
    captured = capture(any_network, networks.images(1))
    assert captured.classes == networks.CLASSES
    for count in (1, 2, 7):
        x = networks.images(count, seed=count)
        assert torch.allclose(captured.network(x), any_network(x), atol=1e-5)


def test_capture_leaves_the_module_unchanged() -> None:
    model = networks.make("Residual").train()
    before = copy.deepcopy(model.state_dict())
    captured = capture(model, networks.images(2))
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    for tensor in tensors_of(captured.network).values():
        tensor.add_(1)  # shares no memory with the module
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_capture_finds_batch_norms_of_every_kind() -> None:
    counts = {
        name: len(capture(networks.make(name), networks.images(1)).batch_norms)
        for name in networks.NETWORKS
    }
    assert counts == {
        "Residual": 2,
        "Branches": 2,
        "Shared": 2,
        "Transposed": 2,
        "Preactivation": 3,
        "Standardised": 1,
        "Awkward": 1,
        "Borders": 1,
        "Tokens": 1,
        "Shuffled": 3,
    }


def test_capture_keeps_the_activation_of_a_norm() -> None:
    captured = capture(networks.make("Standardised"), networks.images(1))
    assert any(queries.is_rectifier(node) for node in captured.network.graph.nodes)


def test_capture_makes_standardised_weights_constant() -> None:
    captured = capture(networks.make("Standardised"), networks.images(1))
    (conv,) = (
        n for n in captured.network.graph.nodes if operators.name_of(n) in operators.CONVOLUTIONS
    )
    assert conv.args[1].op == "get_attr"


class Outputs(nn.Module):
    def __init__(self, give: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.fc = nn.Linear(192, 5)
        self.give = give

    def forward(self, x: Tensor) -> Any:
        return self.give(self.fc(x.flatten(1)))


class ByValue(Outputs):
    def __init__(self) -> None:
        super().__init__(lambda y: y)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1)) if x.sum() > 0 else -self.fc(x.flatten(1))


class BatchOfTwo(Outputs):
    def forward(self, x: Tensor) -> Tensor:
        return (
            self.fc(x.reshape(2, -1, 192).flatten(0, 1))
            if x.shape[0] == 2
            else self.fc(x.flatten(1))
        )


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Outputs(lambda y: (y, "text")), "tuples, lists and dictionaries of tensors.*a str"),
        (Outputs(lambda y: ()), "returned no tensor"),
        (Outputs(lambda y: y / 0), "finite ones"),
        (Outputs(lambda y: y[:, :0]), "nothing in it"),
        (Outputs(lambda y: y.argmax(1)), r"tensor of floats.*returned \[2\]"),
        (Outputs(lambda y: y.sum(0)), r"one entry for each image.*returned \[5\]"),
        (Outputs(lambda y: F.dropout(y, 0.5, training=True)), "native_dropout"),
        (Outputs(lambda y: torch.special.bessel_j0(y)), r"also uses aten\.special_bessel_j0"),
        (ByValue(), "traceable"),
    ],
)
def test_capture_refuses_unsupported_networks(model: nn.Module, message: str) -> None:
    with pytest.raises(UsageError, match=f"(?s){message}"):
        capture(model, networks.images(1))


@pytest.mark.parametrize(
    ("give", "classes"),
    [
        (lambda y: y, 5),
        (lambda y: {"logits": y}, 5),
        (lambda y: [y], 5),
        (lambda y: y[:, :1], None),
        (lambda y: y[:, :, None], None),
        (lambda y: (y, y), None),
    ],
)
def test_capture_takes_one_output_of_two_or_more_columns_for_logits(
    give: Callable[[Tensor], object], classes: int
) -> None:
    model = Outputs(give)
    assert capture(model, networks.images(1)).classes == classes
    assert capture(model, networks.images(1), classifier=False).classes is None
    if classes is None:
        with pytest.raises(UsageError, match="a classifier returns one tensor of logits"):
            capture(model, networks.images(1), classifier=True)


def test_outputs_have_the_order_of_the_network() -> None:
    model = Outputs(lambda y: {"b": 2 * y, "a": [y, {"c": y + 1}]})
    captured = capture(model, networks.images(1))
    assert captured.outputs == {"b": 0, "a": [1, {"c": 2}]}
    x = networks.images(3)
    y = model.fc(x.flatten(1))
    for actual, expected in zip(captured.network(x), (2 * y, y, y + 1), strict=True):
        assert torch.allclose(actual, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 1, 8, 8), r"must accept an input of 1x8x8.*Give the shape it was trained on"),
        ((3, 8, 8), r"needs the batch first; got \[3, 8, 8\]\. Give x\[None\]"),
        ((1, 1, 3, 8, 8), r"shape is given without the batch: 3x8x8\."),
    ],
)
def test_capture_refuses_a_wrong_input_shape(
    residual: nn.Module, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        capture(residual, torch.zeros(shape))


def test_capture_refuses_a_state_dict(residual: nn.Module) -> None:
    with pytest.raises(UsageError, match=r"holds weights alone\. Load it into the network first"):
        capture(residual.state_dict(), networks.images(1))  # type: ignore[arg-type]


def test_capture_refuses_weights_that_are_not_finite() -> None:
    model = networks.make("Residual")
    with torch.no_grad():
        model.get_parameter("conv1.weight")[0, 0, 0, 0] = torch.nan
    with pytest.raises(UsageError, match=r"conv1\.weight.*NaN"):
        capture(model, networks.images(1))


class Crossed(nn.Module):
    """Attention between two sequences: its one weight is used in parts."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.query = nn.Linear(8, 8)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)
        return self.fc(self.attention(self.query(x), x, x, need_weights=False)[0].mean(1))


def test_layers_have_the_names_of_their_modules() -> None:
    """Also where a weight is computed or cut into parts; such parts are parameters as it is."""
    captured = capture(Crossed().eval(), torch.zeros(1, 8, 2, 5))
    layers = [n for n in captured.network.graph.nodes if queries.has_weight(n)]
    assert [queries.layer_name(layer) for layer in layers] == [
        *("query", "attention.in_proj", "attention.in_proj", "attention.out_proj", "fc")
    ]
    tensors = tensors_of(captured.network)
    parts = [tensors[layer.args[1].target] for layer in layers[1:3]]
    assert [tuple(part.shape) for part in parts] == [(8, 8), (16, 8)]
    assert all(isinstance(part, nn.Parameter) for part in parts)

    standardised = capture(networks.make("Standardised"), networks.images(1))
    layers = list(filter(queries.has_weight, standardised.network.graph.nodes))
    assert [queries.layer_name(layer) for layer in layers] == ["conv", "fc"]


class Windows(nn.Module):
    """Shifted windows with a mask that is filled in place, as torchvision's Swin has it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.fc = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).flatten(2).transpose(1, 2)
        mask = x.new_zeros((4, 4))
        for i, rows in enumerate(((0, 2), (2, 4))):
            mask[rows[0] : rows[1], :] = i
        mask = mask.flatten().unsqueeze(0) - mask.flatten().unsqueeze(1)
        mask = mask.masked_fill(mask != 0, -100.0).masked_fill(mask == 0, 0.0)
        return self.fc((x @ x.transpose(1, 2) + mask).softmax(-1).mean(1))


def test_capture_makes_a_mask_of_fixed_size_constant() -> None:
    model = Windows().eval()
    captured = capture(model, torch.zeros(1, 3, 4, 4))
    names = {operators.name_of(node) for node in captured.network.graph.nodes}
    assert not any("fill" in name or "zeros" in name or "copy" in name for name in names)
    x = networks.images(3, shape=(3, 4, 4))
    assert torch.allclose(captured.network(x), model(x), atol=1e-6)


class Talking(nn.Module):
    """Prints to standard error."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        print("I run", file=sys.stderr)
        return self.linear(x)


def test_what_a_network_prints_while_it_is_traced_is_not_lost(
    capsys: pytest.CaptureFixture[str],
) -> None:
    tracing.trace(Talking(), tracing.Arguments((torch.zeros(2, 4),), {}))
    assert "I run" in capsys.readouterr().err
