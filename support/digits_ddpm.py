"""A small class-conditional UNet2DModel of diffusers, trained on the digits' training half.

Training takes about three minutes of one thread. The pipeline is kept in a folder under
benchmarks/cache. It needs diffusers and scikit-learn.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from support.places import CACHE
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from gdfq import demo
from gdfq.execution.seeding import stream

SHAPE = demo.INPUT_SHAPE
SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "clip_sample": False,
    "prediction_type": "epsilon",
}
UPDATES, BATCH, RATE, DECAY = 1500, 64, 2e-3, 0.995
"""Updates, images of each, the rate of AdamW at their start, and the decay of the weights' mean."""


def digits_pipeline(seed: int = 0, updates: int = UPDATES) -> Path:
    """The folder of the trained pipeline; it is trained if it is not there."""
    import diffusers

    folder = CACHE / f"digits_ddpm-{updates}-{seed}"
    if not (folder / "model_index.json").exists():  # it is written last
        scheduler = diffusers.DDIMScheduler(**SCHEDULER)
        network = trained(scheduler.alphas_cumprod, seed, updates)
        diffusers.DDIMPipeline(network, scheduler).save_pretrained(folder)
    return folder


def pixels(images: Tensor) -> Tensor:
    """Pixels uint8 of images in -1..1."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def untrained(seed: int) -> Any:
    """The network with random weights: 177,000 parameters."""
    import diffusers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return diffusers.UNet2DModel(
            sample_size=8, in_channels=1, out_channels=1, block_out_channels=(16, 32),
            layers_per_block=1, norm_num_groups=8, attention_head_dim=8, num_class_embeds=10,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip


def trained(signal: Tensor, seed: int, updates: int) -> Any:
    """The mean over time of a network that learns to predict the noise in digits of given classes.

    Args:
        signal: The share of the image in its power at each time step, [1000].
        seed: Of the weights and of all draws.
        updates: Updates of the network.
    """
    digits, _ = demo.load_digits()
    images = digits.images / 127.5 - 1
    network = untrained(seed)
    mean = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    draw = stream(seed, "digits_ddpm.train")
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    for _ in range(updates):
        chosen = torch.randint(len(images), (BATCH,), generator=draw)
        t = torch.randint(len(signal), (BATCH,), generator=draw)
        noise = torch.randn(BATCH, *SHAPE, generator=draw)
        share = signal[t][:, None, None, None]
        noisy = share.sqrt() * images[chosen] + (1 - share).sqrt() * noise
        loss = F.mse_loss(network(noisy, t, digits.labels[chosen]).sample, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        mean.update_parameters(network)
    return mean.module.eval()
