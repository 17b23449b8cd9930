"""The scale of the inputs that a network was trained on, as far as the network itself tells it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gdfq.functional.losses import relative_statistics_loss
from gdfq.graph.capture import Captured
from gdfq.graph.statistics import StatisticsNetwork, first_moments, unit_input


@dataclass(frozen=True)
class InputStatistics:
    """The statistics that images of a network's input space should have.

    Attributes:
        mean: Mean of each channel, [C].
        deviation: Standard deviation of all channels, a scalar.
        contrast: Standard deviation of the logarithm of an image's contrast.
    """

    mean: Tensor
    deviation: Tensor
    contrast: float

    @classmethod
    def unit(cls, teacher: Captured) -> "InputStatistics":
        """Return mean 0, deviation 1, and the same contrast for all images."""
        mean, variance = unit_input(teacher)
        return cls(mean, variance[0], 0.0)


_MEAN_PENALTY = 0.01
"""λ, the weight of the penalty on the mean. It decides where the first filters give no information,
for instance because they sum to 0."""


@torch.no_grad()
def estimate_input_statistics(teacher: Captured, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of the inputs that the first batch norm learned from.

    Normalised inputs need not have mean 0 and deviation 1: with mean and std 0.5 they have about
    half of that, raw pixels something else. As far as all before the batch norm is affine, inputs
    m + s·noise give its K channels the means b + A m and the variances v + s²d². Here b, A [K, C],
    d, and v, which the borders make of m, are measured on the network. In units of the channels'
    own deviations σ these lie closest to the stored statistics (μ, σ²) for

        m = argmin ‖(b + A m − μ)/σ‖² + λ‖m/s‖²,   s = argmin ‖(s·d − √max(0, σ² − v))/σ‖²

    with v = 0 for the s in the first, and no unit below 10⁻³, because channels that hardly vary
    carry no information.

    Args:
        teacher: The trained network.
        noise: [N, C, *size], of mean 0 and deviation 1.

    Returns:
        Mean [C] and deviation, a scalar. They are 0 and 1 where the network gives no information,
        and where what precedes the batch norm is so far from affine that they fit better.
    """
    stored = StatisticsNetwork(teacher).stored[0]
    mean, variance = stored
    unit = variance.sqrt().clamp_min(1e-3)
    first = first_moments(teacher)
    d = first(noise)[1].sqrt() / unit

    def deviation(v: Tensor | float) -> Tensor:
        rest = (variance - v).clamp_min(0).sqrt() / unit
        return (d * rest).sum() / d.square().sum()

    nothing = torch.zeros_like(noise[:1])
    channels = torch.arange(noise.shape[1], device=noise.device)
    b, _ = first(nothing)
    a = torch.stack([first(nothing.index_fill(1, c, 1))[0] - b for c in channels], 1)
    a = a / unit[:, None]
    pull = _MEAN_PENALTY / deviation(0.0).square() * torch.eye(len(channels), device=noise.device)
    m = torch.linalg.solve(a.T @ a + pull, a.T @ ((mean - b) / unit))
    shape = (1, -1, *[1] * (noise.ndim - 2))
    s = deviation(first(nothing + m.view(shape))[1])

    def error(images: Tensor) -> Tensor:
        return relative_statistics_loss([first(images)], [stored])

    # A comparison with what is not finite is false.
    if s > 0 and error(torch.addcmul(m.view(shape), noise, s)) <= error(noise):
        return m, s
    return torch.zeros_like(m), torch.ones_like(s)
