"""The losses, one function an equation (`docs/equations.md`).

N images, C classes, L batch norms; K is the number of batch-norm channels of the whole network.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Statistics = Sequence[tuple[Tensor, Tensor]]
"""Mean and biased variance of each batch norm's input, each of shape [channels of that layer]."""


def class_boundary_loss(teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """L_CE(G) = E[CE(M(x̂), y)]: the classification boundary loss of arXiv 2003.03603.

    teacher_logits [N, C], labels [N] -> scalar.
    """
    return F.cross_entropy(teacher_logits, labels)


def batch_norm_statistics_loss(seen: Statistics, stored: Statistics) -> Tensor:
    """L_BNS(G) = 1/L Σ_l [MSE(μ_l(x̂), μ_l) + MSE(σ²_l(x̂), σ²_l)]:
    the batch-norm statistics loss of arXiv 2003.03603.

    The mean square error is the mean over a layer's channels. Written as one weighted sum over
    all K channels, because a loop of small operations over L layers costs more than the sum.
    """
    seen_all, stored_all, weight = _concatenate(seen, stored)
    return (weight * (seen_all - stored_all).square()).sum()


def standard_deviation_loss(seen: Statistics, stored: Statistics) -> Tensor:
    """Σ_l [MSE(μ_l(x̂), μ_l) + MSE(σ_l(x̂), σ_l)]: ZeroQ's form (arXiv 2001.00281).

    Standard deviations instead of variances, and the sum over layers instead of their mean.
    """
    return len(seen) * batch_norm_statistics_loss(_deviations(seen), _deviations(stored))


def distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float, reduction: str
) -> Tensor:
    """T² KL(softmax(M/T) ‖ softmax(Q/T)); logits [N, C] -> scalar.

    `reduction` is "batch" (the mean over the batch: the standard definition) or "element" (the
    mean over batch *and classes*, C times smaller: what the published numbers were made with).
    """
    kl = F.kl_div(
        F.log_softmax(student_logits / temperature, 1),
        F.log_softmax(teacher_logits / temperature, 1),
        reduction="batchmean",
        log_target=True,
    )
    classes = {"batch": 1, "element": student_logits.shape[1]}[reduction]
    return kl * (temperature**2 / classes)


def _concatenate(seen: Statistics, stored: Statistics) -> tuple[Tensor, Tensor, Tensor]:
    """All seen and all stored statistics [2K], and each channel's weight 1/(L channels) [2K]."""
    weight = torch.cat(
        [mean.new_full((mean.numel(),), 1 / (len(stored) * mean.numel())) for mean, _ in stored]
    )

    def flat(pairs: Statistics) -> Tensor:
        return torch.cat([mean for mean, _ in pairs] + [variance for _, variance in pairs])

    return flat(seen), flat(stored), weight.repeat(2)


def _deviations(statistics: Statistics) -> Statistics:
    # The floor keeps the square root's gradient finite on a channel that is constant.
    return [(mean, variance.clamp_min(1e-12).sqrt()) for mean, variance in statistics]
