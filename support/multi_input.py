"""Small networks that take more than one image: a time step, or tokens and a mask."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TOKENS, VOCABULARY, CLASSES = 6, 20, 4


class Denoiser(nn.Module):
    """An image [N, 3, 8, 8] and a time step [N] -> noise and its level, in a dictionary."""

    def __init__(self, integer_time: bool = False) -> None:
        super().__init__()
        self.integer_time = integer_time
        self.steps = nn.Embedding(10, 8) if integer_time else nn.Linear(1, 8)
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 3, 3, padding=1)
        self.level = nn.Linear(8, 1)

    def forward(self, image: Tensor, time: Tensor) -> dict[str, Tensor]:
        embedded = self.steps(time if self.integer_time else time[:, None])
        x = F.relu(self.bn(self.conv1(image)) + embedded[:, :, None, None])
        return {"noise": self.conv2(x), "level": self.level(x.mean((2, 3)))}


class Tokens(nn.Module):
    """Token ids [N, T] and a mask [N, T] -> logits [N, 4] of each sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.position = nn.Parameter(torch.randn(TOKENS, 16) * 0.1)
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))
        self.norm = nn.LayerNorm(16)
        self.fc1, self.fc2 = nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embedding(ids) + self.position
        q, k, v = self.query(x), self.key(x), self.value(x)
        x = x + F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, :])
        x = x + self.fc2(F.relu(self.fc1(self.norm(x))))
        return self.head(x.mean(1))


def denoiser(integer_time: bool = False) -> Denoiser:
    torch.manual_seed(0)
    return Denoiser(integer_time).eval()


def denoiser_inputs(count: int, integer_time: bool = False, seed: int = 1) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    image = torch.randn(count, 3, 8, 8, generator=draw)
    steps = torch.randint(10, (count,), generator=draw)
    return {"image": image, "time": steps if integer_time else steps / 10}


def tokens() -> Tokens:
    torch.manual_seed(0)
    return Tokens().eval()


def token_inputs(count: int, seed: int = 1) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (count, TOKENS), generator=draw)
    lengths = torch.randint(2, TOKENS + 1, (count, 1), generator=draw)
    return {"ids": ids, "mask": torch.arange(TOKENS) < lengths}
