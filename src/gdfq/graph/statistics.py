"""Batch-norm statistics of a batch, with gradients, at little more than the cost of reading.

The statistics loss needs mean and variance of *every* batch norm's input. Written with
`x.mean()` and `x.var()` they cost as much as the network itself. Here the batch norm (in
evaluation form a scale and shift per channel) and the moments of its input are one operator:

    y = s x + t;   m = E[x];   v = E[(x − m)²]
    ∂x = s ∂y + (2/n) ∂v x + (∂m − 2 ∂v m)/n        n elements a channel

so the backward pass is two fused multiply-adds over the tensor, exact to rounding.
`benchmarks/speed.py` compares the formulations.
"""

import operator
from typing import Any

import torch
from torch import Tensor, fx

from gdfq.errors import UsageError
from gdfq.execution.distributed import Statistics
from gdfq.execution.precision import to_float32
from gdfq.functional.losses import relative_statistics_loss
from gdfq.graph import queries
from gdfq.graph.batch_norms import BatchNorm, batch_norm_of
from gdfq.graph.capture import Captured
from gdfq.graph.rewrite import Copy, rewrite
from gdfq.graph.tensors import tensors_of


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel of x [N, C, *], both [C]."""
    if x.device.type == "cpu":
        # The moments kernel of the training batch norm: ten times faster than var_mean there.
        channels = x.new_zeros(x.shape[1])
        mean, variance = torch.batch_norm_update_stats(x, channels, channels.clone(), 0.0)
        return mean, variance
    dims = [d for d in range(x.ndim) if d != 1]
    variance, mean = torch.var_mean(x, dims, correction=0)
    return mean, variance


class _NormWithMoments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
        mean, variance = moments(x)
        ctx.save_for_backward(x, scale, mean)
        return torch.addcmul(shift, x, scale), mean, variance

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        grad_y, grad_mean, grad_variance = grads
        x, scale, mean = ctx.saved_tensors
        n = x.numel() / mean.numel()
        slope = (2 / n) * grad_variance
        offset = grad_mean / n - slope * mean
        grad_x = torch.addcmul(offset.view_as(scale), x, slope.view_as(scale))
        return grad_x.addcmul_(grad_y, scale), None, None


def _norm_with_moments(x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    result: tuple[Tensor, Tensor, Tensor] = _NormWithMoments.apply(to_float32(x), scale, shift)
    return result


class StatisticsNetwork:
    """The teacher with the moments of its batch norms' inputs beside its outputs.

    Calling it with images [N, *input_shape] returns (what the teacher returns, statistics), where
    the statistics are tied to the batch-norm nodes themselves, not to hooks or an order of modules.
    `stored` holds the running statistics to compare with, in the same order. With `of_input` (mean
    and variance, [C] each) the images' own statistics come first, to be compared with these.

    Raises UsageError when the network has no batch norm.
    """

    def __init__(self, teacher: Captured, *, of_input: tuple[Tensor, Tensor] | None = None) -> None:
        if not teacher.batch_norms:
            raise UsageError(
                "the batch-norm statistics loss needs batch norms; this network has none. "
                "Use recipe 'patches', or give real images (--data, or data=...)."
            )
        norms = [batch_norm_of(teacher, node) for node in teacher.batch_norms]
        self.stored: Statistics = [(norm.mean, norm.variance) for norm in norms]
        self._of_input = of_input is not None
        if of_input is not None:
            self.stored = [of_input, *self.stored]
        self._module = _with_moments(teacher, norms)

    def __call__(self, images: Tensor) -> tuple[Any, Statistics]:
        outputs, statistics = self._module(images)
        if self._of_input:
            statistics = [input_moments(images), *statistics]
        return outputs, statistics


def input_moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Differentiable mean and biased variance of each channel of the images."""
    variance, mean = torch.var_mean(images, [0, *range(2, images.ndim)], correction=0)
    return mean, variance


def unit_input(teacher: Captured) -> tuple[Tensor, Tensor]:
    """Mean 0 and variance 1 of each channel [C]: what normalised inputs are supposed to have."""
    zero = torch.zeros(teacher.input_shape[0], device=teacher.device)
    return zero, torch.ones_like(zero)


_PULL = 0.01
"""Of the input's mean to 0: it decides where the first filters, of zero sum say, tell nothing."""


@torch.no_grad()
def remembered_input(teacher: Captured, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [C] and deviation (scalar) of the inputs that the first batch norm learned from.

    Normalised inputs need not have mean 0 and deviation 1: with mean and std 0.5 they have about
    half of that, raw pixels something else. noise [N, C, *size] has mean 0 and deviation 1. As far
    as all before the batch norm is affine, inputs m + s·noise give its K channels the means
    b + A m and the variances v + s²d², where b, A [K, C], d, and v, which the edges make of m, are
    found by asking the network. In units of its own deviations σ these lie next to what is stored,
    (μ, σ²), for

        m = argmin ‖(b + A m − μ)/σ‖² + λ‖m/s‖²,   s = argmin ‖(s·d − √max(0, σ² − v))/σ‖²

    with v = 0 for the s in the first, and no unit below 10⁻³: channels that hardly move say
    nothing. Where the network says nothing of it, and where what comes before is so far from affine
    that it then sees worse, mean 0 and deviation 1.
    """
    network = StatisticsNetwork(teacher)
    mean, variance = network.stored[0]
    unit = variance.sqrt().clamp_min(1e-3)

    def first(images: Tensor) -> tuple[Tensor, Tensor]:
        return network(images)[1][0]

    d = first(noise)[1].sqrt() / unit

    def deviation(v: Tensor | float) -> Tensor:
        rest = (variance - v).clamp_min(0).sqrt() / unit
        return (d * rest).sum() / d.square().sum()

    nothing = torch.zeros_like(noise[:1])
    channels = torch.arange(noise.shape[1], device=noise.device)
    b, _ = first(nothing)
    a = torch.stack([first(nothing.index_fill(1, c, 1))[0] - b for c in channels], 1)
    a = a / unit[:, None]
    pull = _PULL / deviation(0.0).square() * torch.eye(len(channels), device=noise.device)
    m = torch.linalg.solve(a.T @ a + pull, a.T @ ((mean - b) / unit))
    shape = (1, -1, *[1] * (noise.ndim - 2))
    s = deviation(first(nothing + m.view(shape))[1])

    def error(images: Tensor) -> Tensor:
        return relative_statistics_loss([first(images)], network.stored[:1])

    # A comparison with what is not finite is false.
    if s > 0 and error(torch.addcmul(m.view(shape), noise, s)) <= error(noise):
        return m, s
    return torch.zeros_like(m), torch.ones_like(s)


def _with_moments(teacher: Captured, norms: list[BatchNorm]) -> fx.GraphModule:
    """The teacher's graph returning (outputs, [(mean, variance) of each batch norm's input])."""
    tensors = tensors_of(teacher.network)
    values = dict(zip(teacher.batch_norms, norms, strict=True))
    observed: list[tuple[fx.Node, fx.Node]] = []

    def change(copy: Copy, node: fx.Node) -> fx.Node | None:
        graph = copy.graph
        if node in values:
            shape = (1, -1, *([1] * (node.meta["val"].ndim - 2)))
            names = (f"scale_of_{node.name}", f"shift_of_{node.name}")
            for name, value in zip(names, values[node].scale_and_shift(), strict=True):
                tensors[name] = value.view(shape)
            arguments = (copy[queries.input_of(node)], *map(graph.get_attr, names))
            triple = graph.call_function(_norm_with_moments, arguments)
            y, mean, variance = (
                graph.call_function(operator.getitem, (triple, i)) for i in range(3)
            )
            observed.append((mean, variance))
            return y
        if node.op == "output":
            return copy.output((copy.mapped(node.args[0]), observed))
        return None

    graph = rewrite(teacher.network.graph, change)
    graph.eliminate_dead_code()
    return fx.GraphModule(tensors, graph)
