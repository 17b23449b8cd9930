"""Attention becomes two matrix products."""

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
