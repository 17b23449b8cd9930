"""Small denoisers of diffusion models."""

from pathlib import Path

import torch
from torch import Tensor, nn

SHAPE = (1, 8, 8)
CLASSES = 4


class TinyDenoiser(nn.Module):
    """An image [N, 1, 8, 8], a time step [N] and perhaps a label [N] -> noise."""

    def __init__(self, classes: int = 0) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(1, 16), nn.SiLU(), nn.Linear(16, 8))
        self.labels = nn.Embedding(classes, 8) if classes else None
        self.enter = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.middle = nn.Conv2d(8, 8, 3, padding=1)
        self.leave = nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        embedded = self.time(t[:, None] / 100)
        if self.labels is not None:
            embedded = embedded + self.labels(label)
        y = self.enter(x)
        y = y + self.middle(torch.relu(self.norm(y + embedded[:, :, None, None])))
        found: Tensor = self.leave(torch.relu(y))
        return found


def tiny_denoiser(classes: int = 0) -> TinyDenoiser:
    """A denoiser with random weights, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return TinyDenoiser(classes).eval()


def saved_unet(folder: Path, *, classes: int | None = None, pipeline: bool = True) -> Path:
    """A UNet2DModel of diffusers with random weights and attention, alone or in a pipeline."""
    import diffusers

    torch.manual_seed(0)
    network = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8),
        norm_num_groups=4, layers_per_block=1, attention_head_dim=4, num_class_embeds=classes,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    if pipeline:
        diffusers.DDPMPipeline(network, diffusers.DDIMScheduler()).save_pretrained(folder)
    else:
        network.save_pretrained(folder)
    return folder
