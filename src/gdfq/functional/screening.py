"""Scores of images that were made for no network: how well a network knows them.

N images, C classes or channels, L batch norms. Low scores are good.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gdfq.execution.distributed import Statistics
from gdfq.execution.precision import to_float32

ImageStatistics = Sequence[tuple[Tensor, Tensor]]
"""Mean and biased variance of each image alone, [N, C] each, for each batch norm."""


def energy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return E = −T log Σ_k exp(z_k/T) of each image (arXiv 2010.03759; GenQ, arXiv 2312.05272).

    A network has low energies for images of its training distribution.

    Args:
        logits: z, [N, C].
        temperature: T.

    Returns:
        [N].
    """
    return -temperature * torch.logsumexp(to_float32(logits) / temperature, 1)


def image_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance [N, C] of each image of x [N, C, *]; no gradients."""
    flat = x.detach().flatten(2) if x.ndim > 2 else x.detach()[:, :, None]
    variance, mean = torch.var_mean(flat, 2, correction=0)
    return mean, variance


def joint_moments(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance [C] of all images, from those of each image.

        μ = 1/N Σ_i μ_i,   σ² = 1/N Σ_i [σ²_i + (μ_i − μ)²]

    Args:
        mean: μ_i, [N, C].
        variance: σ²_i, [N, C].
    """
    joint = mean.mean(0)
    return joint, (variance + (mean - joint).square()).mean(0)


def moments_without_each(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of all images but one, for each image left out.

    With d_i = μ_i − μ and q_i = σ²_i + d_i², N of whose mean is σ²:

        μ₋ᵢ = μ − d_i/(N − 1),   σ²₋ᵢ = (N σ² − q_i)/(N − 1) − (d_i/(N − 1))²

    Args:
        mean: μ_i of each image, [N, C], N ≥ 2.
        variance: σ²_i of each image, [N, C].

    Returns:
        Both [N, C]; row i leaves out image i.
    """
    rest = len(mean) - 1
    joint, joint_variance = joint_moments(mean, variance)
    difference = mean - joint
    own = variance + difference.square()
    without = (len(mean) * joint_variance - own) / rest - (difference / rest).square()
    return joint - difference / rest, without.clamp_min(0)


def batch_norm_sensitivity(images: ImageStatistics, target: Statistics) -> Tensor:
    """Return S_i = N [D(all) − D(all but i)], what image i adds to the batch-norm distance.

    D is `gdfq.functional.losses.relative_statistics_loss`. The statistics without an image follow
    from the moments of each image, so no image passes the network twice. A positive S_i says that
    the others are nearer to the network's statistics without the image. The factor N makes the
    scores of small and large batches comparable. (Batch-norm sensitivity of GenQ, arXiv
    2312.05272, which has squared errors of means and variances.)

    Args:
        images: Statistics of each image, [N, C] each, N ≥ 2.
        target: Stored statistics of the batch norms.

    Returns:
        [N].
    """
    total = images[0][0].new_zeros(len(images[0][0]))
    for (mean, variance), (stored, stored_variance) in zip(images, target, strict=True):
        unit = stored_variance.clamp_min(1e-12).sqrt().clamp_min(1e-3)
        deviation = stored_variance.clamp_min(1e-12).sqrt() / unit

        def distance(
            mean: Tensor,
            variance: Tensor,
            stored: Tensor = stored,
            unit: Tensor = unit,
            deviation: Tensor = deviation,
        ) -> Tensor:
            relative = variance.clamp_min(1e-12).sqrt() / unit - deviation
            return (((mean - stored) / unit).square() + relative.square()).mean(-1)

        everything = distance(*joint_moments(mean, variance))
        total += everything - distance(*moments_without_each(mean, variance))
    return total * (len(total) / len(target))
