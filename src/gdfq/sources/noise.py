"""Noise with the input statistics of a network: what images are compared with."""

import torch
from torch import Tensor

from gdfq.execution.seeding import stream
from gdfq.graph.capture import Captured
from gdfq.sources.input_scale import estimate_input_statistics
from gdfq.sources.spectral import SpectralSource, natural_noise

_SCALE_IMAGES = 32
"""Noise images that the input statistics of the network are found with."""


def noise_like_inputs(count: int, teacher: Captured) -> dict[str, Tensor]:
    """Return white and 1/f noise [count, *input_shape] with the network's input statistics.

    For a network without batch norms they have mean 0 and variance 1.

    Args:
        count: Number of images of each kind.
        teacher: The trained network.

    Returns:
        Images under "white" and "natural", the same for each call.
    """
    draw, shape = stream(0, "evidence.noise"), teacher.input_shape
    white = torch.randn(count, *shape, generator=draw)
    natural = natural_noise(count, shape, SpectralSource(), draw)
    noises = {"white": white.to(teacher.device), "natural": natural.to(teacher.device)}
    if not teacher.batch_norms:
        return noises
    mean, deviation = estimate_input_statistics(teacher, noises["natural"][:_SCALE_IMAGES])
    mean = mean.view(-1, *[1] * (len(shape) - 1))
    return {kind: torch.addcmul(mean, noise, deviation) for kind, noise in noises.items()}
