"""A scheduler with the interface of those of diffusers, for tests without that library."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from gdfq.diffusion.scheduler import Scheduler, SchedulerConfig


@dataclass(frozen=True)
class PlainConfig(SchedulerConfig):
    """Time steps T, T − T/n, ...; each step subtracts prediction/n from the image, and adds noise.

    Attributes:
        times: T.
        noise: Standard deviation of the noise that each step adds.
        sigma: Standard deviation of the first image.
    """

    text: str = '{"_class_name": "PlainScheduler"}'
    times: int = 100
    noise: float = 0.0
    sigma: float = 1.0

    def __post_init__(self) -> None:
        """Accept any values."""

    def _made(self) -> "PlainScheduler":
        return PlainScheduler(self, 1)

    def build(self, steps: int) -> Scheduler:
        """Return a new scheduler."""
        return PlainScheduler(self, steps)


class PlainScheduler:
    """See `PlainConfig`. The denoiser gets the image halved."""

    def __init__(self, config: PlainConfig, steps: int) -> None:
        self.config, self.steps = config, steps
        self.timesteps = torch.arange(steps, 0, -1) * (config.times // steps)
        self.init_noise_sigma = config.sigma

    def scale_model_input(self, sample: Tensor, timestep: Any) -> Tensor:
        """Return half of the image."""
        del timestep
        return sample / 2

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        *,
        generator: Sequence[torch.Generator] = (),
        **options: Any,
    ) -> Any:
        """Return the image of the next call."""
        del timestep, options
        following = sample - model_output / self.steps
        if self.config.noise and generator:
            shape = sample.shape[1:]
            noise = torch.stack([torch.randn(shape, generator=draw) for draw in generator])
            following = following + self.config.noise * noise.to(sample.device)
        return SimpleNamespace(prev_sample=following)
