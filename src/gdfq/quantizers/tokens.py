"""Quantizers of language models: blocks of a weight's columns, and a scale for each token."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdfq.execution.precision import to_float32
from gdfq.functional.grid import Layout, block_size, tokens_straight_through
from gdfq.quantizers.base import QuantizedTensor
from gdfq.quantizers.lsq import LearnedWeight


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
        columns = weight.shape[1]
        size = block_size(columns, block)
        padded = F.pad(weight.detach(), (0, -columns % size))
        super().__init__(padded.reshape(-1, size), bits, layout, groups, symmetric=True)
        self.rows, self.columns, self.block = len(weight), columns, block

    def _joined(self, blocks: Tensor) -> Tensor:
        """Return blocks [O B, size] as rows [O, I], without the padding."""
        return blocks.reshape(self.rows, -1)[:, : self.columns]

    def forward(self, weight: Tensor) -> Tensor:
        return self._joined(super().forward(weight))

    @torch.no_grad()
    def fit_(self, weight: Tensor, inputs: Tensor, ridge: Tensor) -> None:
        """Start again from another weight, each code rounded to nearest."""
        del inputs, ridge
        fresh = BlockWeight(weight, self.bits, self.layout, self.groups, block=self.block)
        self.load_state_dict(fresh.state_dict())

    @torch.no_grad()
    def quantized(self, weight: Tensor) -> QuantizedTensor:
        found = super().quantized(weight)
        scale, zero_point = (x.reshape(self.rows, -1) for x in (found.scale, found.zero_point))
        return QuantizedTensor(self._joined(found.codes), scale, zero_point, self.bits)


class TokenRounding(nn.Module):
    """Rounds an activation with a scale for each token, which nothing calibrates or learns."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def forward(self, x: Tensor) -> Tensor:
        return tokens_straight_through(to_float32(x), self.bits)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"
