"""The losses, one function for each equation (`docs/equations.md`).

N images, C classes, L batch norms; K is the number of batch-norm channels of the whole network.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gdfq.execution.distributed import ALONE, Group, Statistics
from gdfq.execution.precision import to_float32


def class_boundary_loss(teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """Return L_CE(G) = E[CE(M(x̂), y)]: the class-boundary loss of arXiv 2003.03603.

    Args:
        teacher_logits: M(x̂), [N, C].
        labels: y, [N].

    Returns:
        A scalar.
    """
    return F.cross_entropy(to_float32(teacher_logits), labels)


def batch_norm_statistics_loss(observed: Statistics, target: Statistics) -> Tensor:
    """Return L_BNS(G) = 1/L Σ_l [MSE(μ_l(x̂), μ_l) + MSE(σ²_l(x̂), σ²_l)]:
    the batch-norm statistics loss of arXiv 2003.03603.

    The mean square error is the mean over a layer's channels. Written as one weighted sum over
    all K channels, because a loop of small operations over L layers costs more than the sum.
    """
    observed_all, target_all, weight = _concatenate(observed, target)
    return (weight * (observed_all - target_all).square()).sum()


def standard_deviation_loss(observed: Statistics, target: Statistics) -> Tensor:
    """Return Σ_l [MSE(μ_l(x̂), μ_l) + MSE(σ_l(x̂), σ_l)]: ZeroQ's form (arXiv 2001.00281).

    Standard deviations instead of variances, and the sum over layers instead of their mean.
    """
    return len(observed) * batch_norm_statistics_loss(_deviations(observed), _deviations(target))


def relative_statistics_loss(observed: Statistics, target: Statistics) -> Tensor:
    """Return 1/L Σ_l mean_c [((μ̂ − μ)/σ)² + (σ̂/σ − 1)²],
    both errors in units of the channel's own σ.

    A channel's weight does not depend on the size of its values. A floor of 10⁻³ on σ prevents
    that channels that are almost constant dominate the loss.
    """
    units = [deviation.clamp_min(1e-3) for _, deviation in _deviations(target)]

    def in_units(statistics: Statistics) -> Statistics:
        pairs = zip(_deviations(statistics), units, strict=True)
        return [(mean / unit, deviation / unit) for (mean, deviation), unit in pairs]

    return batch_norm_statistics_loss(in_units(observed), in_units(target))


def focal_loss(logits: Tensor, labels: Tensor, gamma: float) -> Tensor:
    """Return E[(1 − p_y)^γ · (−log p_y)] (arXiv 1708.02002), which gives easy images less weight.

    Args:
        logits: [N, C].
        labels: y, [N].
        gamma: γ; 0 gives the cross-entropy.

    Returns:
        A scalar.
    """
    log_p = F.log_softmax(to_float32(logits), 1).gather(1, labels[:, None])
    # 1 − p reaches 0, where a power below 1 would have no gradient.
    return -((1 - log_p.exp()).clamp_min(1e-12).pow(gamma) * log_p).mean()


def feature_loss(
    observed: Sequence[Tensor], target: Sequence[Tensor], group: Group = ALONE
) -> Tensor:
    """Return 1/B Σ_b ‖F̂_b − F_b‖² / ‖F_b‖² over the features of B blocks.

    Args:
        observed: Features F̂_b of the student, each [N, ...].
        target: Features F_b of the teacher in the same shapes; they get no gradient.
        group: ‖F_b‖² is the mean over the shards of its processes, so that the mean of their losses
            is that of the whole batch.

    Returns:
        A scalar.
    """
    observed, target = list(map(to_float32, observed)), list(map(to_float32, target))
    powers = group.mean(torch.stack([inner(teacher, teacher) for teacher in target]).detach())
    errors = [
        _RelativeError.apply(student, teacher, power)
        for student, teacher, power in zip(observed, target, powers, strict=True)
    ]
    return torch.stack(errors).mean()


class _RelativeError(torch.autograd.Function):
    """‖a − b‖² / p, in three passes over memory for both directions."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, power: Tensor) -> Tensor:
        power = power.clamp_min(1e-12 * b.numel())
        difference = a - b
        ctx.save_for_backward(difference, power)
        return inner(difference, difference) / power

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        difference, power = ctx.saved_tensors
        return difference * (2 * grads[0] / power), None, None


def patch_entropy(patches: Tensor) -> Tensor:
    """Return the mean of `patch_entropies` over M groups of P patches, [M, P, d]; a scalar."""
    return -_logarithms(patches).mean() * _SPACING


def patch_entropies(patches: Tensor) -> Tensor:
    """Return H = −∫ f(t) log f(t) dt, the diversity of patch similarity of arXiv 2203.02250.

    f is the density of the cosine similarities of patches: a Gaussian kernel estimate over the
    pairs of different patches. The integral is a sum over an even grid. Patches that are all equal
    have the least entropy.

    Args:
        patches: M groups of P patches, [M, P, d].

    Returns:
        The entropy of each group, [M].
    """
    return -_logarithms(patches) * _SPACING


def _logarithms(patches: Tensor) -> Tensor:
    """Return Σ_t f(t) log f(t) over the points of the grid, [M]."""
    unit = F.normalize(patches, dim=-1)
    similarity = (unit @ unit.transpose(1, 2)).flatten(1)  # [M, P²]
    count = patches.shape[1]
    different = ~torch.eye(count, dtype=torch.bool, device=patches.device).flatten()
    similarity = similarity[:, different]
    points = torch.linspace(-1.2, 1.2, _POINTS, device=patches.device)
    kernel = (-((similarity[:, :, None] - points) / _BANDWIDTH).square() / 2).exp()
    density = kernel.mean(1) / (_BANDWIDTH * math.sqrt(2 * math.pi))  # [M, points]
    return (density * density.clamp_min(1e-12).log()).sum(1)


_POINTS, _BANDWIDTH = 49, 0.1
"""Points of the density's grid, and standard deviation of its kernel. The grid reaches from −1.2 to
1.2, so that the tails of the kernels lie inside."""
_SPACING = float(torch.linspace(-1.2, 1.2, _POINTS)[1] + 1.2)


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Return Σ a b of two tensors of one shape, in one pass and without a product tensor."""
    if a.ndim == 4:
        a, b = a.permute(0, 2, 3, 1), b.permute(0, 2, 3, 1)
    return torch.dot(a.reshape(-1), b.reshape(-1))


def distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float, reduction: str
) -> Tensor:
    """Return T² KL(softmax(M/T) ‖ softmax(Q/T)).

    Args:
        student_logits: Q, [N, C].
        teacher_logits: M, [N, C].
        temperature: T.
        reduction: "batch" is the mean over the batch, the standard definition. "element" is the
            mean over batch and classes, C times smaller: the published numbers were made with it.

    Returns:
        A scalar.
    """
    kl = F.kl_div(
        F.log_softmax(to_float32(student_logits) / temperature, 1),
        F.log_softmax(to_float32(teacher_logits) / temperature, 1),
        reduction="batchmean",
        log_target=True,
    )
    classes = {"batch": 1, "element": student_logits.shape[1]}[reduction]
    return kl * (temperature**2 / classes)


def next_token_losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return −log p(next token) of each token but the last, [N, L - 1].

    The exponential of the mean is the perplexity a token.

    Args:
        logits: Of the next token, [N, L, V].
        tokens: [N, L].
    """
    log_p = F.log_softmax(to_float32(logits[:, :-1]), -1)
    return -log_p.gather(-1, tokens[:, 1:, None]).squeeze(-1)


def token_divergences(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Return KL(teacher ‖ student) of each distribution, in nats.

    Args:
        student_logits: [..., V].
        teacher_logits: In the same shape.

    Returns:
        Divergences in the shape without the last dimension.
    """
    ours, theirs = (F.log_softmax(to_float32(x), -1) for x in (student_logits, teacher_logits))
    return (theirs.exp() * (theirs - ours)).sum(-1)


def _concatenate(observed: Statistics, target: Statistics) -> tuple[Tensor, Tensor, Tensor]:
    """Return all observed and all target statistics, and the weight 1/(L channels), each [2K]."""
    weight = torch.cat(
        [mean.new_full((mean.numel(),), 1 / (len(target) * mean.numel())) for mean, _ in target]
    )

    def flat(pairs: Statistics) -> Tensor:
        return torch.cat([mean for mean, _ in pairs] + [variance for _, variance in pairs])

    return flat(observed), flat(target), weight.repeat(2)


def _deviations(statistics: Statistics) -> Statistics:
    # The floor keeps the square root's gradient finite on a channel that is constant.
    return [(mean, variance.clamp_min(1e-12).sqrt()) for mean, variance in statistics]
