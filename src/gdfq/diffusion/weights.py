"""Weights of a denoiser's errors by time step, so that no step dominates a loss."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gdfq.diffusion.scheduler import SchedulerConfig
from gdfq.files.plain_values import tagged
from gdfq.functional.signal_noise import min_snr_weights


@tagged("MinSnr")
@dataclass(frozen=True)
class MinSnr:
    """Min-SNR weights (`gdfq.functional.signal_noise.min_snr_weights`) of a scheduler.

    Near the end of a trajectory, where SNR is large, an error of the noise hardly changes the
    image: its weight is 5 / SNR. Without it, the errors of these steps, the largest, rule a loss.

    Attributes:
        scheduler: Says what the denoiser predicts, and how much noise there is at each time step.
    """

    scheduler: SchedulerConfig

    def weights(self, times: Tensor) -> Tensor:
        """Return the weights [N] of predictions at time steps [N]; 1 without a known noise."""
        snr = self.scheduler.signal_to_noise(times)
        if snr is None:
            return torch.ones(len(times), device=times.device)
        return min_snr_weights(snr, self.scheduler.prediction)

    def plain_value(self) -> dict[str, Any]:
        """Return plain values, which identify the weights in configurations."""
        return {"class": "MinSnr", "scheduler": self.scheduler.values}
