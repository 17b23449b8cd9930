"""Moment matching: the correction of a student's biases and weight scales."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from gdfq.execution.budget import MemoryBudget
from gdfq.graph import operators, queries
from gdfq.graph.batch_norms import fold_batch_norms
from gdfq.graph.capture import Captured
from gdfq.graph.memory import part_images
from gdfq.graph.walk import PartsInterpreter
from gdfq.quantizers.base import ActivationQuantizer, WeightQuantizer
from gdfq.sources.base import split_inputs
from gdfq.student.build import Student


@torch.no_grad()
def match_moments_(
    student: Student,
    teacher: Captured,
    inputs: Sequence[Tensor],
    memory: MemoryBudget = MemoryBudget(),
) -> None:
    """Give each layer's output channels the teacher's mean and standard deviation.

    Rounding scales and shifts the values of a channel, and the error grows over the layers. Layer
    by layer, on the outputs of the corrected layers before, the weight's scale and the bias
    compensate the difference, and each activation range is recomputed. The factor on the scale is
    limited to 1/2..2. Nagel et al. (arXiv 1906.04721) correct the mean alone, which at three bits
    is worse than no correction. A channel stays unchanged if a few values make up its variance:
    if the student clips those, the factor would scale all its values to compensate. A layer that
    is used twice is corrected at its first use.

    Args:
        student: A student whose weight quantizers rescale, changed in place.
        teacher: The network whose moments are the targets.
        inputs: [N, *shape] for each input of the network. Only the first entries are used, up to
            2^24 elements together (111 of 3x224x224), because more large images add nothing.
        memory: Decides whether the images pass in parts. The moments of a batch in parts differ
            only by the rounding of sums.
    """
    used = tuple(tensor[: matched_images(inputs)] for tensor in inputs)
    network = fold_batch_norms(teacher).network
    at_once = part_images(network.graph, len(used[0]), memory, used[0].device)
    parts = split_inputs(used, at_once)
    targets = _OutputMoments(network)
    targets.run_parts(parts)
    _MatchMoments(student.network, targets.moments).run_parts(parts)


def matched_images(inputs: Sequence[Tensor]) -> int:
    """Return how many entries of inputs [N, *shape] are used at most."""
    return max(1, _MAX_ELEMENTS // sum(math.prod(tensor.shape[1:]) for tensor in inputs))


_MAX_ELEMENTS = 2**24
"""Maximum elements of the images whose moments are matched."""
_MIN_SAMPLES = 32
"""Minimum values of a channel for a standard deviation."""
_MAX_VARIANCE_ERROR = 0.3
"""Largest relative standard error of a variance that is matched. One value among 200 that makes up
all of the variance gives 1, values of a normal distribution give 0.1."""


class _OutputMoments(PartsInterpreter):
    """Runs a network and records mean and variance of the output channels of each layer.

    A third tensor [O] says which of the variances more than a few values make up.
    """

    def __init__(self, network: fx.GraphModule) -> None:
        super().__init__(network)
        self.moments: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def after(self, node: fx.Node, envs: Sequence[dict[fx.Node, Any]]) -> None:
        if queries.has_weight(node):
            parts = [env[node] for env in envs]
            mean, variance = _channel_moments(node, parts)
            error = _variance_error(node, parts, mean, variance)
            self.moments[node.name] = mean, variance, error <= _MAX_VARIANCE_ERROR


class _MatchMoments(PartsInterpreter):
    """Runs a student and corrects each layer before the next one runs."""

    def __init__(
        self, network: fx.GraphModule, targets: dict[str, tuple[Tensor, Tensor, Tensor]]
    ) -> None:
        super().__init__(network)
        self.targets = targets
        self.corrected: set[WeightQuantizer] = set()

    def before(self, node: fx.Node, envs: Sequence[dict[fx.Node, Any]]) -> None:
        if isinstance(quantizer := self.submodules.get(str(node.target)), ActivationQuantizer):
            quantizer.batches.zero_()
            (source,) = node.all_input_nodes
            quantizer.observe_(*(env[source] for env in envs))

    def after(self, node: fx.Node, envs: Sequence[dict[fx.Node, Any]]) -> None:
        if operators.name_of(node) not in operators.WEIGHTED:
            return
        weight = self.submodules.get(queries.weight_name(node))
        if not isinstance(weight, WeightQuantizer) or weight in self.corrected:
            return
        self.corrected.add(weight)
        mean, variance = _channel_moments(node, [env[node] for env in envs])
        target_mean, target, is_known = self.targets[node.name]
        # Nearly constant channels, or few samples, do not determine a scale.
        varies = torch.minimum(variance, target) > 1e-6 * target.mean()
        samples = sum(env[node].numel() for env in envs) // len(mean)
        ratio = (target / variance.clamp_min(torch.finfo(variance.dtype).tiny)).sqrt()
        is_known = is_known | (samples < _MIN_SAMPLES)
        matched = varies & is_known & (samples >= _MIN_SAMPLES)
        factor = torch.where(matched, ratio.clamp(0.5, 2.0), 1.0)
        shift = torch.where(is_known, target_mean - factor * mean, 0.0)
        bias_node = queries.bias_of(node)
        assert bias_node is not None
        weight.rescale_(factor)
        self.fetch_attr(str(bias_node.target)).mul_(factor).add_(shift)
        shape = [1] * envs[0][node].ndim
        shape[queries.channel_dim(node)] = -1
        for env in envs:
            env[node] = env[node] * factor.view(shape) + shift.view(shape)


def _channel_moments(layer: fx.Node, parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of each output channel over all parts [n, ...], each [O]."""
    channels = queries.channel_dim(layer) % parts[0].ndim
    others = [d for d in range(parts[0].ndim) if d != channels]
    found = [torch.var_mean(part, others, correction=0) for part in parts]
    if len(found) == 1:
        variance, mean = found[0]
        return mean, variance
    total = sum(map(len, parts))
    shares = torch.tensor([len(part) / total for part in parts], dtype=torch.float64)
    shares = shares.to(parts[0].device)[:, None]
    variances, means = (torch.stack(values).double() for values in zip(*found, strict=True))
    whole = (shares * means).sum(0)
    spread = (shares * (variances + (means - whole).square())).sum(0)
    return whole.to(parts[0].dtype), spread.to(parts[0].dtype)


def _variance_error(
    layer: fx.Node, parts: Sequence[Tensor], mean: Tensor, variance: Tensor
) -> Tensor:
    """Return the relative standard error of each channel's variance, √((κ − 1) / n): [O].

    n is the number of values and κ their kurtosis, at most n: a few values then make up all of the
    variance.
    """
    channels = queries.channel_dim(layer) % parts[0].ndim
    shape = [1] * parts[0].ndim
    shape[channels] = -1
    others = [d for d in range(parts[0].ndim) if d != channels]
    fourth = sum((part - mean.view(shape)).pow(4).sum(others) for part in parts)
    count = sum(part.numel() for part in parts) // len(mean)
    kurtosis = fourth / (count * variance.square()).clamp_min(torch.finfo(variance.dtype).tiny)
    return ((kurtosis - 1).clamp_min(0) / count).sqrt()
