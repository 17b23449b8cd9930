"""Attention becomes two matrix products; clamps have one form and precede what moves values."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdfq.graph import operators
from gdfq.graph.capture import capture


class Masked(nn.Module):
    """Attention in all the forms that the functional one has."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options
        self.project = nn.Linear(4, 8)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.project(x.flatten(2).transpose(1, 2)).unflatten(2, (2, 4)).transpose(1, 2)
        options = dict(self.options)
        key = x[:, :1] if options.get("enable_gqa") else x
        return self.head(F.scaled_dot_product_attention(x, key, key, **options).mean((1, 2)))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": 0.3},
        {"is_causal": True},
        {"attn_mask": torch.linspace(-1, 1, 36).view(6, 6)},
        {"attn_mask": torch.ones(6, 6, dtype=torch.bool).triu()},
        {"enable_gqa": True},
    ],
)
def test_attention_is_captured_as_two_products(options: dict[str, Any]) -> None:
    model = Masked(**options).eval()
    x = torch.randn(3, 4, 2, 3, generator=torch.Generator().manual_seed(0))
    captured = capture(model, x[:1])
    with torch.no_grad():
        assert torch.allclose(captured.network(x), model(x), atol=1e-6)
    products = [
        n for n in captured.network.graph.nodes if operators.name_of(n) in operators.PRODUCTS
    ]
    assert len(products) == 2


class Clamped(nn.Module):
    """A convolution and a function of what it returns."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(3 * self.conv(x))


def captured_clamp(function: Callable[[Tensor], Tensor]) -> list[Any]:
    """The operators after the convolution, after a check that they compute the same."""
    torch.manual_seed(0)
    model = Clamped(function).eval()
    x = torch.randn(3, 4, 6, 6)
    captured = capture(model, x[:1], classifier=False)
    with torch.no_grad():
        # Layouts in memory differ, and with them the rounding of sums on some processors.
        torch.testing.assert_close(captured.network(x), model(x))
    names = [operators.short_name(node) for node in captured.network.graph.nodes]
    return [name for name in names[names.index("mul") + 1 :] if name]


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (lambda x: torch.minimum(x, torch.tensor(2.0)), ["clamp"]),
        (lambda x: torch.maximum(torch.tensor([-1.0]), x), ["clamp"]),
        (lambda x: x.clamp(torch.tensor(-1.0), torch.tensor(2.0)), ["clamp"]),
        (lambda x: torch.minimum(x, torch.linspace(0, 1, 6)), ["minimum"]),
        (lambda x: torch.maximum(x, -x), ["neg", "maximum"]),
    ],
)
def test_clamp_by_one_number_has_one_form(
    function: Callable[[Tensor], Tensor], names: list[str]
) -> None:
    assert captured_clamp(function) == names


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (lambda x: F.relu(F.max_pool2d(x, 2)), ["relu", "max_pool2d"]),
        (lambda x: F.hardtanh(F.pad(x, (1, 2))), ["hardtanh", "pad"]),
        (lambda x: F.relu6(F.pixel_shuffle(x, 2)), ["relu6", "pixel_shuffle"]),
        (lambda x: F.relu(F.interpolate(x, scale_factor=2).amax(3)), ["relu", "upsample_nearest2d", "amax"]),
        (lambda x: F.pad(x, (1, 2)).clamp(0.5, 2), ["pad", "clamp"]),  # 0 becomes 0.5
        (lambda x: F.relu(F.pad(x, (1, 2), value=-1.0)), ["pad", "relu"]),
        (lambda x: F.relu(y := F.max_pool2d(x, 2)) + y, ["max_pool2d", "relu", "add"]),
        (lambda x: F.relu(F.avg_pool2d(x, 2)), ["avg_pool2d", "relu"]),
    ],
)  # fmt: skip
def test_clamp_around_zero_precedes_what_moves_values(
    function: Callable[[Tensor], Tensor], names: list[str]
) -> None:
    found = captured_clamp(function)
    assert [name for name in found if name in {*names}] == names
