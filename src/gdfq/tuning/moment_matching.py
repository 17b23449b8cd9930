"""Moment matching: the correction of a student's biases and weight scales."""

from typing import Any

import torch
from torch import Tensor, fx

from gdfq.graph import operators, queries
from gdfq.graph.batch_norms import fold_batch_norms
from gdfq.graph.capture import Captured
from gdfq.quantizers.base import ActivationQuantizer, WeightQuantizer
from gdfq.student.build import Student


@torch.no_grad()
def match_moments_(student: Student, teacher: Captured, images: Tensor) -> None:
    """Give each layer's output channels the teacher's mean and standard deviation.

    Rounding scales and shifts the values of a channel, and over many layers that grows. Layer after
    layer, each on the inputs that its corrected predecessors give, the scale of the weight and the
    bias compensate the difference, and each activation range is found again. The factor on the
    scale is limited to 1/2..2. (Nagel et al., arXiv 1906.04721, correct the mean alone, which at
    three bits is worse than no correction.) A layer that is used twice is corrected where it comes
    first.

    Args:
        student: A student whose weight quantizers rescale, changed in place.
        teacher: The network whose moments are the targets.
        images: [N, *input_shape].
    """
    targets = _OutputMoments(fold_batch_norms(teacher).network)
    targets.run(images)
    _MatchMoments(student.network, targets.moments).run(images)


_MIN_SAMPLES = 32
"""Values of a channel that a standard deviation needs."""


class _OutputMoments(fx.Interpreter):
    """Runs a network and records mean and variance of the output channels of each layer."""

    def __init__(self, network: fx.GraphModule) -> None:
        super().__init__(network)
        self.moments: dict[str, tuple[Tensor, Tensor]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if queries.has_weight(n):
            self.moments[n.name] = _channel_moments(n, value)
        return value


class _MatchMoments(fx.Interpreter):
    """Runs a student and corrects each layer before the next one runs."""

    def __init__(self, network: fx.GraphModule, targets: dict[str, tuple[Tensor, Tensor]]) -> None:
        super().__init__(network)
        self.targets = targets
        self.corrected: set[WeightQuantizer] = set()

    def run_node(self, n: fx.Node) -> Any:
        if isinstance(quantizer := self.submodules.get(str(n.target)), ActivationQuantizer):
            quantizer.batches.zero_()
            (x,), _ = self.fetch_args_kwargs_from_env(n)
            quantizer.observe_(x)
        value = super().run_node(n)
        if operators.name_of(n) not in operators.WEIGHTED:
            return value
        weight = self.submodules.get(queries.weight_name(n))
        if not isinstance(weight, WeightQuantizer) or weight in self.corrected:
            return value
        self.corrected.add(weight)
        (mean, variance), (target_mean, target) = _channel_moments(n, value), self.targets[n.name]
        # Channels that hardly vary say nothing about their scale, nor do a few samples.
        varies = torch.minimum(variance, target) > 1e-6 * target.mean()
        samples = value.numel() // len(mean)
        ratio = (target / variance.clamp_min(torch.finfo(variance.dtype).tiny)).sqrt()
        factor = torch.where(varies & (samples >= _MIN_SAMPLES), ratio.clamp(0.5, 2.0), 1.0)
        shift = target_mean - factor * mean
        bias_node = queries.bias_of(n)
        assert bias_node is not None
        weight.rescale_(factor)
        self.fetch_attr(str(bias_node.target)).mul_(factor).add_(shift)
        shape = [1] * value.ndim
        shape[queries.channel_dim(n)] = -1
        return value * factor.view(shape) + shift.view(shape)


def _channel_moments(layer: fx.Node, output: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of each output channel, each [O]."""
    channels = queries.channel_dim(layer) % output.ndim
    others = [d for d in range(output.ndim) if d != channels]
    variance, mean = torch.var_mean(output, others, correction=0)
    return mean, variance
