"""Moment matching: the correction of a student, in all layers or the last, to its teacher."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx

from gdfq.execution.budget import MemoryBudget
from gdfq.execution.context import Context
from gdfq.execution.progress import Listener, Step
from gdfq.functional.moments import moments
from gdfq.graph import operators, queries
from gdfq.graph.batch_norms import fold_batch_norms
from gdfq.graph.blocks import with_features
from gdfq.graph.capture import Captured
from gdfq.graph.memory import forward_images, part_images
from gdfq.graph.tensors import tensors_of
from gdfq.graph.walk import Inputs, PartsInterpreter
from gdfq.quantizers.base import ActivationQuantizer, WeightQuantizer
from gdfq.sources.base import split_inputs
from gdfq.student.build import Student
from gdfq.tuning.weight_fitting import can_be_fitted, fit_weight_


@torch.no_grad()
def match_moments_(
    student: Student,
    teacher: Captured,
    inputs: Sequence[Tensor],
    context: Context = Context(),
    *,
    fit_weights: bool = False,
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
        inputs: [N, *shape] for each input of the network. Each layer is corrected with so many of
            them that no feature map from this layer on has more than 2^26 elements: 55 images while
            there are 96 channels at half the resolution of 224x224, all of 256 at an eighth.
        context: Its budget of memory decides whether the images pass in parts: the moments of a
            batch in parts differ only by the rounding of sums. Its listener hears of each layer, as
            a step of "fit" or "match".
        fit_weights: Whether each weight is fitted to the teacher's outputs and rounded with
            compensation before (`gdfq.tuning.weight_fitting`).
    """
    network = fold_batch_norms(teacher).network
    counts = matched_images(network.graph, len(inputs[0]))
    at_once = part_images(network.graph, max(counts.values()), context.memory, inputs[0].device)
    parts: dict[str, list[tuple[Tensor, ...]]] = {}
    for name, (before, count) in zip(counts, pairwise([0, *counts.values()]), strict=True):
        if count > before:
            joining = tuple(tensor[before:count] for tensor in inputs)
            parts[name] = split_inputs(joining, at_once)
    first = parts.pop(next(iter(counts)))
    matching = _MatchMoments(
        student.network, network, first, parts, context.listener, fit_weights=fit_weights
    )
    matching.run_parts(first, parts)


@torch.no_grad()
def match_output_mean_(
    student: Student,
    teacher: Captured,
    inputs: Sequence[Tensor],
    memory: MemoryBudget = MemoryBudget(),
) -> None:
    """Give the output channels of a denoiser's last layer the teacher's mean, by the bias alone.

    b + E[y − ŷ] is the bias of least square error. Training leaves it near that, but a mean error
    has the same sign in every call of a sampler, so that it adds up over a trajectory.

    Args:
        student: A student that was trained, changed in place.
        teacher: The network that it was built from: without batch norms where they are folded.
        inputs: [N, *shape] for each input of the network, the noisy image first.
        memory: Decides how many inputs pass together.
    """
    graph = teacher.network.graph
    image = queries.inputs(graph)[0]
    of_image = queries.computed_from(image)
    layer = [node for node in queries.weighted_layers(teacher.network) if node in of_image][-1]
    own = next(node for node in student.network.graph.nodes if node.name == layer.name)
    bias = queries.bias_of(own)
    if bias is None:  # as the teacher's, where batch norms stay that would have given it one
        return
    at_once = forward_images(graph, memory, inputs[0].device)
    target, found = (
        _channel_moments(node, [predict(*part)[1][0] for part in split_inputs(inputs, at_once)])[0]
        for node, predict in (
            (layer, with_features(teacher.network, [layer])),
            (own, with_features(student.network, [own])),
        )
    )
    tensors_of(student.network)[str(bias.target)].add_(target - found)


def matched_images(graph: fx.Graph, images: int) -> dict[str, int]:
    """Return how many of the images each layer of a teacher's graph is corrected with, by name.

    The number never falls, because an image stays from the layer on at which it joins.
    """
    counts: dict[str, int] = {}
    largest = 1
    for node in reversed(graph.nodes):
        read = filter(queries.is_activation, (node, *node.all_input_nodes))
        largest = max([largest, *map(queries.elements_per_image, read)])
        if operators.name_of(node) in operators.WEIGHTED:
            counts[node.name] = min(images, max(_MIN_IMAGES, _MAX_ELEMENTS // largest))
    return dict(reversed(counts.items()))


_MAX_ELEMENTS = 2**26
"""Maximum elements of a feature map of all images that are used together: 256 MiB."""
_MIN_IMAGES = 32
"""Images that are used however large their feature maps are."""
_MIN_SAMPLES = 32
"""Minimum values of a channel for a standard deviation."""
_MAX_VARIANCE_ERROR = 0.3
"""Largest relative standard error of a variance that is matched. One value among 200 that makes up
all of the variance gives 1, values of a normal distribution give 0.1."""


@dataclass(frozen=True, eq=False)
class _Target:
    """Mean and variance of a teacher's output channels, and which of the variances are known.

    A variance that a few values make up is not. All have the shape [O].
    """

    mean: Tensor
    variance: Tensor
    known: Tensor

    @classmethod
    def of(cls, layer: fx.Node, outputs: Sequence[Tensor]) -> "_Target":
        mean, variance = _channel_moments(layer, outputs)
        error = _variance_error(layer, outputs, mean, variance)
        return cls(mean, variance, error <= _MAX_VARIANCE_ERROR)


class _MatchMoments(PartsInterpreter):
    """Runs a student and corrects each layer before the next one runs.

    The teacher runs beside it, a layer ahead, so that only the tensors of the present layer are
    held of both.
    """

    def __init__(
        self,
        network: fx.GraphModule,
        teacher: fx.GraphModule,
        parts: Sequence[Inputs],
        later: Mapping[str, Sequence[Inputs]],
        listener: Listener,
        *,
        fit_weights: bool,
    ) -> None:
        super().__init__(network)
        self.corrected: set[WeightQuantizer] = set()
        self.fit_weights = fit_weights
        self._listener = listener
        self._total = len(set(filter(None, map(self._uncorrected, network.graph.nodes))))
        self._weights = tensors_of(teacher)
        self._teacher = PartsInterpreter(teacher).nodes_of_parts(parts, later)
        self._target: _Target | None = None

    def before(self, node: fx.Node, envs: Sequence[dict[fx.Node, Any]]) -> None:
        if isinstance(quantizer := self.submodules.get(str(node.target)), ActivationQuantizer):
            quantizer.batches.zero_()
            (source,) = node.all_input_nodes
            quantizer.observe_(*(env[source] for env in envs))
        elif (weight := self._uncorrected(node)) is not None:
            layer, outputs = self._teacher_layer(node.name)
            self._target = _Target.of(layer, outputs)
            old = self._weights[queries.weight_name(layer)]
            if self.fit_weights and can_be_fitted(node, weight, old):
                inputs = [env[queries.input_of(node)] for env in envs]
                fit_weight_(weight, node, old, inputs, outputs, self._target.known)
                for env in envs:
                    env[queries.weight_of(node)] = weight(old)

    def after(self, node: fx.Node, envs: Sequence[dict[fx.Node, Any]]) -> None:
        weight, target = self._uncorrected(node), self._target
        if weight is None:
            return
        assert target is not None
        self.corrected.add(weight)
        values = [env[node] for env in envs]
        mean, variance = _channel_moments(node, values)
        # Nearly constant channels, or few samples, do not determine a scale.
        varies = torch.minimum(variance, target.variance) > 1e-6 * target.variance.mean()
        samples = sum(value.numel() for value in values) // len(mean)
        ratio = (target.variance / variance.clamp_min(torch.finfo(variance.dtype).tiny)).sqrt()
        is_known = target.known | (samples < _MIN_SAMPLES)
        matched = varies & is_known & (samples >= _MIN_SAMPLES)
        factor = torch.where(matched, ratio.clamp(0.5, 2.0), 1.0)
        shift = torch.where(is_known, target.mean - factor * mean, 0.0)
        bias_node = queries.bias_of(node)
        assert bias_node is not None
        weight.rescale_(factor)
        self.fetch_attr(str(bias_node.target)).mul_(factor).add_(shift)
        shape = [1] * envs[0][node].ndim
        shape[queries.channel_dim(node)] = -1
        for env in envs:
            env[node] = env[node] * factor.view(shape) + shift.view(shape)
        stage = "fit" if self.fit_weights else "match"
        self._listener(Step(stage, len(self.corrected), self._total, {}))

    def _uncorrected(self, node: fx.Node) -> WeightQuantizer | None:
        """Return the quantizer of a layer's weight, if the node is one and it is the first use."""
        if operators.name_of(node) not in operators.WEIGHTED:
            return None
        weight = self.submodules.get(queries.weight_name(node))
        is_new = isinstance(weight, WeightQuantizer) and weight not in self.corrected
        return weight if is_new else None

    def _teacher_layer(self, name: str) -> tuple[fx.Node, list[Tensor]]:
        """Let the teacher run up to a layer; return its node and its outputs in parts."""
        for node, envs in self._teacher:
            if node.name == name:
                return node, [env[node] for env in envs]
        raise LookupError(f"the teacher has no layer {name} after the one before")


def _channel_moments(layer: fx.Node, parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of each output channel over all parts [n, ...], each [O].

    They are found image by image: how the batch is divided changes nothing.
    """
    found = [_image_moments(_channels_second(layer, part)) for part in parts]
    means, variances = (torch.cat(values) for values in zip(*found, strict=True))
    mean = means.mean(0)
    variance = (variances + (means - mean).square()).mean(0)
    return mean.to(parts[0].dtype), variance.to(parts[0].dtype)


def _image_moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance over the positions of values [n, O, P], each [n, O]."""
    if values.device.type == "cpu":
        found = [moments(image[None]) for image in values]
        mean, variance = (torch.stack(of_images) for of_images in zip(*found, strict=True))
    else:
        variance, mean = torch.var_mean(values, 2, correction=0)
    return mean.double(), variance.double()


def _channels_second(layer: fx.Node, values: Tensor) -> Tensor:
    """Return outputs [n, ...] of a layer as [n, O, P]."""
    values = values.movedim(queries.channel_dim(layer), 1)
    return values.reshape(*values.shape[:2], -1)


def _variance_error(
    layer: fx.Node, parts: Sequence[Tensor], mean: Tensor, variance: Tensor
) -> Tensor:
    """Return the relative standard error of each channel's variance, √((κ − 1) / n): [O].

    n is the number of values and κ their kurtosis, at most n: a few values then make up all of the
    variance.
    """
    found = [
        (_channels_second(layer, part) - mean[:, None]).square().square().sum(2).double()
        for part in parts
    ]
    fourth = torch.cat(found).sum(0).to(variance.dtype)
    count = sum(part.numel() for part in parts) // len(mean)
    kurtosis = fourth / (count * variance.square()).clamp_min(torch.finfo(variance.dtype).tiny)
    return ((kurtosis - 1).clamp_min(0) / count).sqrt()
