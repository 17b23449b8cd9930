"""Quantizers of language models: blocks of a weight's columns, and a scale for each token."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdfq.execution.precision import to_float32
from gdfq.functional.grid import Layout, block_size, tokens_straight_through
from gdfq.functional.rounding import nearest_codes, rounded_for_outputs
from gdfq.quantizers.base import QuantizedTensor
from gdfq.quantizers.lsq import LearnedWeight, within_bounds


class BlockWeight(LearnedWeight):
    """A linear layer's weight with a learned symmetric scale for each block of columns of a row.

    The blocks of all rows are the rows of a `LearnedWeight`; the last block of a row is padded
    with 0 where the columns do not divide.

    Args:
        weight: [O, I].
        bits: Bits of a code.
        layout: That of a linear layer.
        groups: 1.
        block: Most columns of a block.
    """

    def __init__(
        self, weight: Tensor, bits: int, layout: Layout, groups: int = 1, *, block: int
    ) -> None:
        assert layout is Layout.ROWS, "only linear layers have blocks of columns"
        blocks = _blocks(weight.detach(), block)
        super().__init__(blocks, bits, layout, groups, symmetric=True)
        self.rows, self.columns, self.block = *weight.shape, block

    def _joined(self, blocks: Tensor) -> Tensor:
        """Return blocks [O B, size] as rows [O, I], without the padding."""
        return blocks.reshape(self.rows, -1)[:, : self.columns]

    def forward(self, weight: Tensor) -> Tensor:
        return self._joined(super().forward(weight))

    @torch.no_grad()
    def fit_(self, weight: Tensor, inputs: Tensor, ridge: Tensor) -> None:
        fresh = BlockWeight(weight, self.bits, self.layout, self.groups, block=self.block)
        scale = fresh.scale.view(1, self.rows, -1).to(inputs.dtype)
        nearest = nearest_codes(torch.zeros_like(ridge), self.bits)  # symmetric: z is 0
        rows = weight[None].to(inputs.dtype)
        latent, scale = rounded_for_outputs(rows, inputs, ridge, scale, nearest, self.bits)
        fresh.scale.copy_(scale.view_as(fresh.scale))
        fresh.codes.copy_(within_bounds(_blocks(latent[0].to(weight.dtype), self.block), self.bits))
        self.load_state_dict(fresh.state_dict())

    @torch.no_grad()
    def quantized(self, weight: Tensor) -> QuantizedTensor:
        found = super().quantized(weight)
        scale, zero_point = (x.reshape(self.rows, -1) for x in (found.scale, found.zero_point))
        return QuantizedTensor(self._joined(found.codes), scale, zero_point, self.bits)


def _blocks(rows: Tensor, block: int) -> Tensor:
    """Return rows [O, I] as blocks [O B, size], padded with 0."""
    size = block_size(rows.shape[1], block)
    return F.pad(rows, (0, -rows.shape[1] % size)).reshape(-1, size)


class TokenRounding(nn.Module):
    """Rounds an activation with a scale for each token, which nothing calibrates or learns."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def forward(self, x: Tensor) -> Tensor:
        return tokens_straight_through(to_float32(x), self.bits)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"
