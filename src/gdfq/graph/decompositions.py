"""Operators that an exported graph has in the form of simpler ones."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gdfq.graph import operators


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    _dropout: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(Q Kᵀ s + mask) V (arXiv 1706.03762): two products with quantizable inputs.

    Q [*, T, d], K [*, S, d], V [*, S, e] -> [*, T, e]; s is d^−½ unless given. The signature is
    that of `torch.nn.functional.scaled_dot_product_attention`.
    """
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = (torch.stack([tensor] * groups, -3).flatten(-4, -3) for tensor in (key, value))
    scores = query @ key.transpose(-2, -1)
    scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~visible, -math.inf)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -math.inf)
    elif mask is not None:
        scores = scores + mask
    return scores.softmax(-1) @ value


def _lstm_cell(
    x: Tensor,
    state: tuple[Tensor, Tensor],
    weight_x: Tensor,
    weight_h: Tensor,
    bias_x: Tensor | None = None,
    bias_h: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of an LSTM, as `torch.nn.LSTMCell` documents it: x [N, I], state 2 [N, H]."""
    h, c = state
    gates = F.linear(x, weight_x, bias_x) + F.linear(h, weight_h, bias_h)
    enter, forget, new, leave = gates.chunk(4, 1)
    c = forget.sigmoid() * c + enter.sigmoid() * new.tanh()
    return leave.sigmoid() * c.tanh(), c


def _gru_cell(
    x: Tensor,
    h: Tensor,
    weight_x: Tensor,
    weight_h: Tensor,
    bias_x: Tensor | None = None,
    bias_h: Tensor | None = None,
) -> Tensor:
    """One step of a GRU, as `torch.nn.GRUCell` documents it: x [N, I], h [N, H]."""
    reset_x, update_x, new_x = F.linear(x, weight_x, bias_x).chunk(3, 1)
    reset_h, update_h, new_h = F.linear(h, weight_h, bias_h).chunk(3, 1)
    new = (new_x + (reset_x + reset_h).sigmoid() * new_h).tanh()
    return (h - new) * (update_x + update_h).sigmoid() + new


def _rnn_cell(activation: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """Return one step of an Elman network, as `torch.nn.RNNCell` documents it."""

    def cell(
        x: Tensor,
        h: Tensor,
        weight_x: Tensor,
        weight_h: Tensor,
        bias_x: Tensor | None = None,
        bias_h: Tensor | None = None,
    ) -> Tensor:
        return activation(F.linear(x, weight_x, bias_x) + F.linear(h, weight_h, bias_h))

    return cell


def _rrelu(
    x: Tensor,
    lower: float = 1 / 8,
    upper: float = 1 / 3,
    training: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """In evaluation mode, a leaky ReLU with the mean slope."""
    del generator
    return NotImplemented if training else F.leaky_relu(x, (lower + upper) / 2)


def _cosine_similarity(x: Tensor, y: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    """x y / (max(‖x‖, ε) max(‖y‖, ε)), as `torch.nn.functional.cosine_similarity` computes it."""
    of_x, of_y = (torch.linalg.vector_norm(part, 2, dim).clamp_min(eps) for part in (x, y))
    similarity: Tensor = (x * y).sum(dim) / of_x / of_y
    return similarity


DECOMPOSED: Mapping[Any, Callable[..., Any]] = {
    operators.aten_function(name): function
    for name, function in (
        (operators.ATTENTION, _attention),
        (operators.LSTM_CELL, _lstm_cell),
        (operators.GRU_CELL, _gru_cell),
        (operators.RNN_TANH_CELL, _rnn_cell(torch.tanh)),
        (operators.RNN_RELU_CELL, _rnn_cell(torch.relu)),
        (operators.RRELU, _rrelu),
        (operators.COSINE_SIMILARITY, _cosine_similarity),
    )
}
"""Operators that export decomposes; all others are only made functional."""
