"""A small causal language model in plain PyTorch, with the parts of a Llama."""

from dataclasses import dataclass, replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdfq.data.vocabulary import Vocabulary
from gdfq.graph.capture import Captured, capture
from gdfq.graph.tensors import tensors_of


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model; two heads of queries share one of keys and values."""

    vocabulary: int = 40
    width: int = 16
    hidden: int = 24
    heads: int = 4
    layers: int = 2
    length: int = 32


class RootMeanSquareNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))


class Attention(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width, self.size = sizes.width, sizes.width // sizes.heads
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, width // 2, bias=False)
        self.v = nn.Linear(width, width // 2, bias=False)
        self.o = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        count, length, _ = x.shape
        q, k, v = (
            layer(x).view(count, length, -1, self.size).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        angles = torch.arange(length)[:, None] / 10.0 ** torch.arange(self.size // 2)
        turns = torch.cat([angles, angles], -1)
        q, k = (self._turned(part, turns) for part in (q, k))
        k, v = (part[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2) for part in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        found: Tensor = self.o(mixed.transpose(1, 2).reshape(count, length, -1))
        return found

    @staticmethod
    def _turned(x: Tensor, turns: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * turns.cos() + torch.cat([-second, first], -1) * turns.sin()


class GatedLayers(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.gate = nn.Linear(sizes.width, sizes.hidden, bias=False)
        self.up = nn.Linear(sizes.width, sizes.hidden, bias=False)
        self.down = nn.Linear(sizes.hidden, sizes.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return found


class Block(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.norm, self.attention = RootMeanSquareNorm(sizes.width), Attention(sizes)
        self.second_norm, self.gated = RootMeanSquareNorm(sizes.width), GatedLayers(sizes)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        found: Tensor = x + self.gated(self.second_norm(x))
        return found


class TinyLanguageModel(nn.Module):
    """Token ids [N, L] -> logits of the next token [N, L, vocabulary]; the head is the embedding."""

    def __init__(self, sizes: Sizes = Sizes()) -> None:
        super().__init__()
        self.embedding = nn.Embedding(sizes.vocabulary, sizes.width)
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes.layers))
        self.norm = RootMeanSquareNorm(sizes.width)
        self.head = nn.Linear(sizes.width, sizes.vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        found: Tensor = self.head(self.norm(x))
        return found


def vocabulary(sizes: Sizes = Sizes(), begin: int | None = 1) -> Vocabulary:
    return Vocabulary(sizes.vocabulary, sizes.length, begin)


def tiny_model(sizes: Sizes = Sizes()) -> TinyLanguageModel:
    """A model of random weights, large enough that its predictions differ, and norms far from 1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = TinyLanguageModel(sizes).eval()
        for name, parameter in model.named_parameters():
            if "norm" in name:
                torch.nn.init.uniform_(parameter, 0.5, 2.0)
            else:  # a large embedding would predict the token that was read, whatever follows
                parameter.data.mul_(0.3 if "embedding" in name else 2.0)
    return model


@cache
def captured_model(sizes: Sizes = Sizes(), begin: int | None = 1) -> Captured:
    return capture(tiny_model(sizes), tokens(sizes), vocabulary=vocabulary(sizes, begin))


def tokens(sizes: Sizes = Sizes(), count: int = 2, length: int = 12, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(sizes.vocabulary, (count, length), generator=draw)


def in_float64(teacher: Captured) -> Captured:
    """A copy whose tensors have float64."""
    graph = teacher.network.graph
    tensors = {n: t.double() if t.is_floating_point() else t for n, t in tensors_of(teacher.network).items()}  # fmt: skip
    return replace(teacher, network=torch.fx.GraphModule(tensors, graph))
