"""The weight of one layer of a student, fitted to the teacher's outputs and rounded."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from gdfq.functional.grid import Layout
from gdfq.functional.rounding import fitted_weight
from gdfq.functional.windows import padding_ends, per_axis, zero_padded
from gdfq.graph import operators, queries
from gdfq.quantizers.base import WeightQuantizer

_MAX_SAMPLES, _MAX_ELEMENTS = 8192, 2**25
"""Positions of all images together at which inputs and outputs of a layer are compared, and the
elements of the sampled inputs: 128 MiB."""
_FIT_RIDGES = (0.3, 1.0, 3.0, 10.0)
"""λ of the fit that are tried, as shares of the mean variance of the layer's inputs. The images are
made, so directions that they hardly show may matter for real ones: none is smaller."""
_ROUNDING_RIDGE = 0.1
"""λ of the compensation, as a share of the same variance."""
_TINY = torch.finfo(torch.float32).tiny
_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


def can_be_fitted(layer: fx.Node, quantizer: WeightQuantizer, weight: Tensor) -> bool:
    """Return whether `fit_weight_` applies.

    It does not to transposed convolutions, nor to layers with more inputs than positions that are
    compared: these do not determine the weight, and the covariance of 25,088 inputs (VGG-16) alone
    has 5 GB.
    """
    is_direct = operators.name_of(layer) in operators.CONVOLUTIONS | operators.LINEARS
    is_small = weight[0].numel() <= _MAX_SAMPLES
    return quantizer.layout is Layout.ROWS and is_direct and is_small


def fit_weight_(
    quantizer: WeightQuantizer,
    layer: fx.Node,
    weight: Tensor,
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    trusted: Tensor,
    *,
    centred: bool = True,
) -> None:
    """Fit a layer's weight to the wanted outputs, for the inputs that it gets, and round it.

    The inputs of a student differ from the teacher's by the rounding of the layers before: the
    fitted weight makes up for a part of that, and the codes for one another's rounding. The less
    of an output the student's inputs explain, the less its weights are fitted: made images may hold
    values that the student clips, which real ones do not.

    Args:
        quantizer: The quantizer of the weight, changed in place.
        layer: A convolution or linear layer.
        weight: The teacher's weight, [O, K/g, *k] or [O, K].
        inputs: The student's inputs of the layer, in parts [n, ...].
        targets: The teacher's outputs of the layer, in the same parts.
        trusted: Whether an output's weights may be fitted, [O]; else they are only rounded.
        centred: Whether means are left to the bias; else they are fitted, too.
    """
    groups = queries.group_count(layer)
    columns = groups * weight[0].numel()
    most = min(_MAX_SAMPLES, max(1, _MAX_ELEMENTS // columns))
    x = _input_samples(layer, weight.shape[2:], inputs, groups, most)  # [P, G, K]
    y = _output_samples(layer, targets, most).unflatten(1, (groups, -1))  # [P, G, R]
    if centred:
        x, y = (samples - samples.mean(0) for samples in (x, y))
    x, y = (samples.transpose(0, 1) for samples in (x, y))
    rows = weight.detach().double().reshape(groups, -1, x.shape[2])
    seen, ridge = _moments_and_ridge(rows, x, y)
    wanted = seen.fitted(ridge)
    unexplained = seen.unexplained(rows)
    share = (1 - unexplained).clamp_min(0) * trusted.view_as(unexplained)
    fitted = rows.lerp(wanted, share[:, :, None]).to(weight.dtype).view_as(weight)
    quantizer.fit_(fitted, seen.inputs, _ROUNDING_RIDGE * seen.variance)


@dataclass(frozen=True, eq=False)
class _SecondMoments:
    """What samples of a layer's inputs x [G, P, K] and wanted outputs y [G, P, R] tell of a weight.

    They are those of what the old weight misses, r = y − W x: of y itself, little would be left of
    large numbers.

    Attributes:
        weight: The old weight W, [G, R, K].
        inputs: E[x xᵀ], [G, K, K].
        cross: E[r xᵀ], [G, R, K].
        missed: E|r|² of each output, [G, R].
        power: E|y|² of each output, [G, R].
        count: P.
    """

    weight: Tensor
    inputs: Tensor
    cross: Tensor
    missed: Tensor
    power: Tensor
    count: int

    @classmethod
    def of(cls, weight: Tensor, x: Tensor, y: Tensor) -> "_SecondMoments":
        count = x.shape[1]
        r = y - x @ weight.to(x.dtype).mT
        inputs, cross = ((part.mT @ x / count).double() for part in (x, r))
        missed, power = (part.square().mean(1).double() for part in (r, y))
        return cls(weight, inputs, cross, missed, power, count)

    def joined(self, other: "_SecondMoments") -> "_SecondMoments":
        """Return the moments of the samples of both, for the same weight."""
        count = self.count + other.count
        share = other.count / count
        return replace(
            self,
            inputs=self.inputs.lerp(other.inputs, share),
            cross=self.cross.lerp(other.cross, share),
            missed=self.missed.lerp(other.missed, share),
            power=self.power.lerp(other.power, share),
            count=count,
        )

    @property
    def variance(self) -> Tensor:
        """The mean variance of x, > 0, [G]."""
        return self.inputs.diagonal(dim1=1, dim2=2).mean(1).clamp_min(_TINY)

    def fitted(self, share: float) -> Tensor:
        """Return the weight [G, R, K] that is fitted with λ as a share of the variance of x."""
        cross = self.cross + self.weight @ self.inputs
        return fitted_weight(self.weight, self.inputs, cross, share * self.variance)

    def unexplained(self, weight: Tensor) -> Tensor:
        """Return E|y − W' x|² / E|y|² of each output for a weight W', [G, R]."""
        change = weight - self.weight
        explained = ((2 * self.cross - change @ self.inputs) * change).sum(2)
        return (self.missed - explained).clamp_min(0) / self.power.clamp_min(_TINY)


def _moments_and_ridge(weight: Tensor, x: Tensor, y: Tensor) -> tuple[_SecondMoments, float]:
    """Return the moments of samples [G, P, K] and [G, P, R], and the ridge that fits them best.

    The weight is fitted to one half of the images and judged by the other, and the reverse: the
    ridge is that of `_FIT_RIDGES` which predicts best what it was not fitted to. (One image is
    halved itself.)
    """
    samples, columns = x.shape[1:]
    if samples < 2:
        return _SecondMoments.of(weight, x, y), _FIT_RIDGES[-1]
    if columns <= samples:
        first, second = _halves(weight, x, y)
        return first.joined(second), _best_fit_ridge(first, second, columns)
    # The weight changes in the span of the samples alone: a smaller problem.
    basis = torch.linalg.qr(x.mT).Q  # [G, K, P]
    halves = _halves(weight @ basis.to(weight.dtype), x @ basis, y)
    return _SecondMoments.of(weight, x, y), _best_fit_ridge(*halves, columns)


def _halves(weight: Tensor, x: Tensor, y: Tensor) -> tuple[_SecondMoments, _SecondMoments]:
    first, second = zip(x.tensor_split(2, 1), y.tensor_split(2, 1), strict=True)
    return _SecondMoments.of(weight, *first), _SecondMoments.of(weight, *second)


def _best_fit_ridge(first: _SecondMoments, second: _SecondMoments, columns: int) -> float:
    """Return the share of `_FIT_RIDGES`, of the variance of all `columns`, that predicts best."""
    of_span = first.weight.shape[2] / columns
    errors = [
        unseen.unexplained(known.fitted(share * of_span)).clamp_max(1).mean()
        for share in _FIT_RIDGES
        for known, unseen in ((first, second), (second, first))
    ]
    of_ridges = torch.stack(errors).view(-1, 2).sum(1)
    return _FIT_RIDGES[int(of_ridges.argmin())]


def _positions(images: int, places: int, most: int, device: torch.device) -> Tensor:
    """Return which of the places of each image are sampled: [images, m]; they differ by image."""
    count = min(places, -(-most // images))
    first = torch.arange(images, device=device).double().mul(_GOLDEN_RATIO).frac().mul(places)
    steps = torch.arange(count, device=device) * places // count
    return (first.long()[:, None] + steps) % places


def _output_samples(layer: fx.Node, parts: Sequence[Tensor], most: int) -> Tensor:
    """Return outputs [P, O] of a layer at the sampled positions."""
    if operators.name_of(layer) in operators.LINEARS:
        return _sampled_rows(parts, most)
    places = math.prod(parts[0].shape[2:])
    return torch.cat(
        [
            part.flatten(2).transpose(1, 2)[_images_of(chosen), chosen].flatten(0, 1)
            for part, chosen in _chosen(parts, places, most)
        ]
    )


def _input_samples(
    layer: fx.Node, kernel: Sequence[int], parts: Sequence[Tensor], groups: int, most: int
) -> Tensor:
    """Return what a layer multiplies by each row of its weight at these positions, [P, G, K]."""
    if operators.name_of(layer) in operators.LINEARS:
        return _sampled_rows(parts, most)[:, None]
    found = []
    shape = _windows(layer, kernel, parts[0][:1]).shape[2 : 2 + len(kernel)]
    for part, chosen in _chosen(parts, math.prod(shape), most):
        windows = _windows(layer, kernel, part).movedim(1, 1 + len(kernel))  # [n, *out, C, *k]
        places = torch.unravel_index(chosen, shape)
        samples = windows[(_images_of(chosen), *places)].flatten(0, 1)  # [n m, C, *k]
        found.append(samples.unflatten(1, (groups, -1)).flatten(2))
    return torch.cat(found)


def _sampled_rows(parts: Sequence[Tensor], most: int) -> Tensor:
    rows = torch.cat([part.flatten(0, -2) for part in parts])
    return rows[:: len(rows) // most | 1]


def _chosen(parts: Sequence[Tensor], places: int, most: int) -> list[tuple[Tensor, Tensor]]:
    """Return each part with the sampled places of its images, [n, m]."""
    sizes = [len(part) for part in parts]
    positions = _positions(sum(sizes), places, most, parts[0].device)
    return list(zip(parts, positions.split(sizes), strict=True))


def _images_of(chosen: Tensor) -> Tensor:
    return torch.arange(len(chosen), device=chosen.device)[:, None]


def _windows(layer: fx.Node, kernel: Sequence[int], x: Tensor) -> Tensor:
    """Return a view of what a convolution multiplies at each output: [n, C, *out, *k]."""
    given: dict[str, Any] = {"stride": 1, "padding": 0, "dilation": 1}
    given |= dict(zip(given, queries.options_of(layer), strict=False))
    given |= {name: value for name, value in layer.kwargs.items() if name in given}
    stride, dilation = (per_axis(given[name], len(kernel)) for name in ("stride", "dilation"))
    x = zero_padded(x, padding_ends(given["padding"], kernel, dilation))
    for dim, (size, step, gap) in enumerate(zip(kernel, stride, dilation, strict=True), 2):
        x = x.unfold(dim, (size - 1) * gap + 1, step)[..., ::gap]
    return x
