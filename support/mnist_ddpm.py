"""The denoiser of `../shared/models/mnist_ddpm.safetensors`, and the scheduler that fits it."""

from typing import Any

import torch
from safetensors.torch import load_file
from support.places import SHARED
from torch import Tensor, nn

WEIGHTS = SHARED / "models" / "mnist_ddpm.safetensors"
SHAPE = (1, 28, 28)
SCHEDULER: dict[str, Any] = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1001,
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "clip_sample": False,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 1,  # the network was trained from 1 to 1000
}


class Block(nn.Module):
    """A convolution of 7x7, a normalisation over all values, GELU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        convolution = nn.Conv2d(inputs, outputs, 7, padding=3)
        self.net = nn.Sequential(convolution, nn.LayerNorm((outputs, 28, 28)), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.net(x)
        return found


class MnistDenoiser(nn.Module):
    """Images [N, 1, 28, 28] and time steps [N] in 1..1000 -> the noise in them."""

    frequencies: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.zeros(16))
        self.time_embed = nn.Sequential(
            nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 128),
            nn.GELU(), nn.Linear(128, 16),
        )  # fmt: skip
        blocks = [Block(1, 16), Block(16, 32), Block(32, 32), Block(32, 16)]
        self.blocks = nn.ModuleList([*blocks, nn.Conv2d(16, 1, 3, padding=1)])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        phases = (t / 1000)[:, None] * self.frequencies
        embedded = self.time_embed(torch.cat([phases.sin(), phases.cos() - 1], 1))
        first, *others = self.blocks
        x = first(x) + embedded[:, :, None, None]
        for block in others:
            x = block(x)
        return x


def mnist_denoiser() -> MnistDenoiser:
    """The network with its weights."""
    network = MnistDenoiser()
    network.load_state_dict(load_file(WEIGHTS))
    return network.eval()
