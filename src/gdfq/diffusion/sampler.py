"""The sampler of a diffusion model: from noise to images, in calls of a denoiser."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gdfq.diffusion.scheduler import Scheduler, SchedulerConfig
from gdfq.errors import UsageError
from gdfq.execution.seeding import stream as random_stream
from gdfq.files.states import digest_of

Denoise = Callable[..., Tensor]
"""Images [N, *shape], time steps [N] and, if there are any, conditions [N, ...] -> predictions."""
Visit = Callable[[int, tuple[Tensor, ...], Tensor], None]
"""Receives the number of a call, the inputs of the denoiser, and what the scheduler uses of its
prediction [N, C or 2 C, *size]."""

STEPS = 50
"""Steps of a trajectory by default: that of the pipelines of diffusers."""


@dataclass(frozen=True, eq=False)
class Sampler:
    """Runs a denoiser from noise to images, with the arithmetic of a scheduler of diffusers.

    A trajectory is a function of its seed alone: the seed gives the first image, the condition and
    the noise of a stochastic scheduler, whatever other trajectories run beside it. No
    classifier-free guidance is applied.

    Attributes:
        scheduler: The scheduler.
        shape: Shape of one image, or of one latent, [C, *size].
        steps: Steps of a trajectory.
        conditions: Conditions [M, ...] of which each trajectory gets one, at random: labels of
            classes, or embeddings of prompts; None for a denoiser that takes none.

    Raises:
        UsageError: The scheduler cannot make so many steps.
    """

    scheduler: SchedulerConfig
    shape: tuple[int, ...]
    steps: int = STEPS
    conditions: Tensor | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or self.steps < 1:
            raise UsageError(
                f"the steps of a sampler must be a whole number of at least 1; got {self.steps}."
            )
        if self.conditions is not None and (not self.conditions.ndim or not len(self.conditions)):
            raise UsageError(
                "conditions must be a tensor [M, ...] of at least one condition; got "
                f"{list(self.conditions.shape)}."
            )
        self.scheduler.build(self.steps)

    def plain_value(self) -> dict[str, Any]:
        """Return plain values, which identify the sampler in configurations."""
        conditions = self.conditions
        return {
            "class": "Sampler",
            "scheduler": self.scheduler.values,
            "shape": list(self.shape),
            "steps": self.steps,
            "conditions": None
            if conditions is None
            else {"shape": list(conditions.shape), "sha256": digest_of(conditions)},
        }

    def __str__(self) -> str:
        """Return the sampler in words."""
        count = 0 if self.conditions is None else len(self.conditions)
        conditions = f", one of {count} conditions each" if count else ""
        return f"{self.scheduler.name}, {self.steps} steps from noise{conditions}"

    @property
    def timesteps(self) -> Tensor:
        """The time steps of all calls of a trajectory, [calls]."""
        return self.scheduler.build(self.steps).timesteps.cpu()

    @property
    def calls(self) -> int:
        """Calls of the denoiser for a trajectory; some schedulers make several for each step."""
        return len(self.timesteps)

    def example(self) -> tuple[Tensor, ...]:
        """Return inputs of a call for one image: noise, the first time step, a condition."""
        # Images of zeros would be constant, and normalisations make much of their roundings.
        images = torch.randn(1, *self.shape, generator=random_stream(0, "sampler.example"))
        conditions = () if self.conditions is None else (self.conditions[:1],)
        return (images, self.timesteps[:1], *conditions)

    @torch.no_grad()
    def run(
        self,
        denoise: Denoise,
        seeds: Sequence[int],
        device: torch.device | str = "cpu",
        visit: Visit | None = None,
        conditions: Tensor | None = None,
    ) -> Tensor:
        """Run the trajectories of some seeds together.

        Args:
            denoise: The network.
            seeds: One for each of N trajectories.
            device: Where the network computes.
            visit: Called after each call of the network.
            conditions: One for each of them, [N, ...]; None draws them from those of the sampler.

        Returns:
            The images at the end, [N, *shape].

        Raises:
            UsageError: The network predicts something of another shape.
        """
        draws = [torch.Generator().manual_seed(seed) for seed in seeds]
        given = self._drawn(draws, device) if conditions is None else [conditions.to(device)]
        scheduler = self.scheduler.build(self.steps)
        noise = torch.stack([torch.randn(self.shape, generator=draw) for draw in draws])
        images: Tensor = noise.to(device) * scheduler.init_noise_sigma
        options = {"generator": draws} if _adds_noise(scheduler) else {}
        for call, step in enumerate(scheduler.timesteps):
            scaled = scheduler.scale_model_input(images, step)
            inputs = (scaled, step.to(device).expand(len(seeds)), *given)
            predicted = self._without_variance(denoise(*inputs), scheduler)
            if visit is not None:
                visit(call, inputs, predicted)
            images = scheduler.step(predicted, step, images, **options).prev_sample
        return images

    def _drawn(self, draws: Sequence[torch.Generator], device: torch.device | str) -> list[Tensor]:
        """Return the conditions of some trajectories, [N, ...], in a list; it may be empty."""
        if self.conditions is None:
            return []
        chosen = [torch.randint(len(self.conditions), (), generator=draw) for draw in draws]
        return [self.conditions[torch.stack(chosen)].to(device)]

    def _without_variance(self, prediction: Tensor, scheduler: Scheduler) -> Tensor:
        """Return a prediction without the variance that some denoisers predict, if it is not used.

        Such a denoiser has twice as many channels (arXiv 2102.09672).
        """
        channels = self.shape[0]
        shape = tuple(prediction.shape[1:])
        learned = str(getattr(scheduler, "variance_type", None)).startswith("learned")
        if shape == (2 * channels, *self.shape[1:]):
            return prediction if learned else prediction[:, :channels]
        if shape != self.shape:
            raise UsageError(
                "a denoiser must predict a tensor of the shape of its image, "
                f"{'x'.join(map(str, self.shape))}, or one of twice as many channels; it predicts "
                f"{'x'.join(map(str, shape))}. Give --input, the shape of the image."
            )
        return prediction


def _adds_noise(scheduler: Scheduler) -> bool:
    """Return whether a scheduler takes generators, because it may add noise."""
    return "generator" in inspect.signature(scheduler.step).parameters
