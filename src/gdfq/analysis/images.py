"""What the synthetic images are worth: their statistics, classes and diversity, beside noise."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gdfq.data.preprocessing import Preprocessing
from gdfq.execution.budget import MemoryBudget
from gdfq.execution.distributed import Statistics
from gdfq.execution.seeding import stream
from gdfq.functional.losses import relative_statistics_loss
from gdfq.graph import queries
from gdfq.graph.batch_norms import batch_norm_name
from gdfq.graph.blocks import with_features
from gdfq.graph.capture import Captured
from gdfq.graph.memory import forward_images
from gdfq.graph.statistics import StatisticsNetwork
from gdfq.sources.input_scale import remembered_input
from gdfq.sources.spectral import SpectralSource, natural_noise

_CLASSES, _EACH = 10, 4
"""The grid of images: so many classes, so many images of each."""
_MAX_TOGETHER = 32
"""Images that pass the teacher together: more are no faster."""
_SIDE = 64
"""Thumbnails are no larger than that."""
_ASKED = 32
"""Images of noise that the network is asked about to find the scale of its inputs."""


@dataclass(frozen=True)
class Distance:
    """How far the statistics of images are from those that a batch norm holds.

    mean_c [((μ̂ − μ)/σ)² + (σ̂/σ − 1)²] (`gdfq.functional.losses.relative_statistics_loss`): 0 is
    equal.
    """

    name: str
    synthetic: float
    white: float
    """Of white noise of the scale that the network remembers (`remembered_input`)."""
    natural: float
    """Of such noise with the spectrum of natural images, 1/f^1.5."""


@dataclass(frozen=True)
class Classes:
    """What the teacher answers to the synthetic images."""

    answered: int
    """Classes that it answers at least once."""
    possible: int
    """Classes that so many images could have: no more than there are images."""
    as_meant: float
    """Share of the images whose answer is their label, in percent."""
    confidence: float
    """Mean probability of the answers, in percent."""


@dataclass(frozen=True)
class Diversity:
    """How different images are: root mean square distances of pairs.

    pixels: of images, by what it would be if their pixels had nothing in common (see `spread`);
    features: of what enters the last layer, by the same of 1/f noise;
    within_class: in features, of pairs of one class by all pairs; None without such pairs.
    """

    pixels: float
    features: float
    within_class: float | None


@dataclass(frozen=True, eq=False)
class Images:
    """All of it. `grid` [n, C, H, W] are pixels by class, `labels` [n] theirs, `noise` as many."""

    count: int
    distances: tuple[Distance, ...]
    classes: Classes | None
    diversity: Diversity
    clipped: float
    """Share of the pixels that lie outside of what a picture can hold, in percent."""
    nearest: str
    """The noise that is nearest to the statistics: "white" or "natural"."""
    grid: np.ndarray[Any, Any]
    labels: np.ndarray[Any, Any]
    noise: np.ndarray[Any, Any]


def measure_images(
    teacher: Captured,
    images: Tensor,
    labels: Tensor | None,
    preprocessing: Preprocessing,
    memory: MemoryBudget = MemoryBudget(),
) -> Images:
    """Look at synthetic (or given) images [N, *input_shape] with labels [N], through the teacher.

    Noise of the same number is looked at in the same way.
    """
    images = images.to(teacher.device)
    noises = {kind: noise.to(images) for kind, noise in _noise(len(images), teacher).items()}
    at_once = min(_MAX_TOGETHER, forward_images(teacher.network.graph, memory, teacher.device))
    distances = _distances(teacher, images, noises, at_once)
    nearest = min(noises, key=lambda kind: sum(getattr(d, kind) for d in distances))
    outputs, features = _asked(teacher, images, at_once)
    _, of_noise = _asked(teacher, noises["natural"], at_once)
    classes = None
    if labels is not None and teacher.classes is not None:
        classes = coverage(outputs, labels)
    chosen = by_class(labels, len(images))
    return Images(
        count=len(images),
        distances=distances,
        classes=classes,
        diversity=Diversity(
            pixels=spread(images),
            features=distance_of_pairs(features) / max(distance_of_pairs(of_noise), 1e-12),
            within_class=None if labels is None else within_classes(features, labels),
        ),
        clipped=clipped(images, preprocessing),
        nearest=nearest,
        grid=thumbnails(images[chosen], preprocessing),
        labels=np.array([]) if labels is None else labels[chosen].cpu().numpy(),
        noise=thumbnails(noises[nearest][: min(len(chosen), _CLASSES)], preprocessing),
    )


def coverage(logits: Tensor, labels: Tensor) -> Classes:
    """What the teacher's logits [N, C] say about images of the given labels [N]."""
    confidence, answers = logits.softmax(1).max(1)
    return Classes(
        answered=len(answers.unique()),
        possible=min(logits.shape),
        as_meant=100 * float((answers == labels.to(answers.device)).double().mean()),
        confidence=100 * float(confidence.double().mean()),
    )


def spread(images: Tensor) -> float:
    """√(V_b / V): V_b the variance of a pixel between the images, V that of all numbers [N, ...].

    1 for images that have nothing in common but their mean, 0 for images that are all alike.
    """
    flat = images.flatten(1).double()
    total = float(flat.var(correction=0))
    between = float(flat.var(0, correction=0).mean())
    return (between / total) ** 0.5 if total > 0 else 0.0


def distance_of_pairs(features: Tensor) -> float:
    """Root mean square distance of the pairs of different rows of [N, d]; 0 of a single one."""
    if len(features) < 2:
        return 0.0
    distance: float = float(F.pdist(features.double()).square().mean()) ** 0.5
    return distance


def within_classes(features: Tensor, labels: Tensor) -> float | None:
    """The distance of pairs [N, d] that have one label [N], by that of all pairs.

    None where no label occurs twice or all rows are alike.
    """
    squares = torch.cdist(features.double(), features.double()).square()
    labels = labels.to(features.device)
    same = (labels[:, None] == labels) & ~torch.eye(len(labels), dtype=torch.bool).to(labels.device)
    everything = distance_of_pairs(features)
    if not bool(same.any()) or not everything:
        return None
    ratio: float = float(squares[same].mean()) ** 0.5 / everything
    return ratio


def clipped(images: Tensor, preprocessing: Preprocessing) -> float:
    """Share of normalised images' pixels, in percent, that are below 0 or above 255."""
    shape = (1, -1, *[1] * (images.ndim - 2))
    mean, std = (torch.tensor(v).view(shape) for v in (preprocessing.mean, preprocessing.std))
    unit = images.cpu() * std + mean
    step = 0.5 / 255  # what rounding forgives
    return 100 * float(((unit < -step) | (unit > 1 + step)).double().mean())


def by_class(labels: Tensor | None, count: int) -> list[int]:
    """Indices of the grid's images: of up to ten classes four each, or simply the first."""
    if labels is None:
        return list(range(min(count, _CLASSES * _EACH)))
    shown = [label for label, _ in Counter(labels.tolist()).most_common(_CLASSES)]
    places = {label: (labels == label).nonzero().flatten().tolist() for label in sorted(shown)}
    return [index for indices in places.values() for index in indices[:_EACH]]


def thumbnails(images: Tensor, preprocessing: Preprocessing) -> np.ndarray[Any, Any]:
    """Pixels uint8 [N, C, h, w] of normalised images, no side longer than 64.

    Inputs that are no pictures of one or three channels give none: [0].
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        return np.zeros(0, np.uint8)
    longest = max(images.shape[2:])
    if longest > _SIDE:
        size = [max(1, round(side * _SIDE / longest)) for side in images.shape[2:]]
        images = F.interpolate(images.float(), size, mode="area")
    return preprocessing.pixels(images).numpy()


def _noise(count: int, teacher: Captured) -> dict[str, Tensor]:
    """Images of white and of 1/f noise [count, *input_shape], as `remembered_input` scales inputs.

    For a network without batch norms they have mean 0 and variance 1.
    """
    draw, shape = stream(0, "evidence.noise"), teacher.input_shape
    white = torch.randn(count, *shape, generator=draw)
    natural = natural_noise(count, shape, SpectralSource(), draw)
    noises = {"white": white.to(teacher.device), "natural": natural.to(teacher.device)}
    if not teacher.batch_norms:
        return noises
    mean, deviation = remembered_input(teacher, noises["natural"][:_ASKED])
    mean = mean.view(-1, *[1] * (len(shape) - 1))
    return {kind: torch.addcmul(mean, noise, deviation) for kind, noise in noises.items()}


def _distances(
    teacher: Captured, images: Tensor, noises: dict[str, Tensor], at_once: int
) -> tuple[Distance, ...]:
    """Of each batch norm, in order; none for a network that has none."""
    if not teacher.batch_norms:
        return ()
    network = StatisticsNetwork(teacher)
    kinds = {"synthetic": images, **noises}
    seen = {kind: _moments(network, given, at_once) for kind, given in kinds.items()}
    return tuple(
        Distance(
            batch_norm_name(node),
            **{
                kind: float(relative_statistics_loss([moments[index]], [network.stored[index]]))
                for kind, moments in seen.items()
            },
        )
        for index, node in enumerate(teacher.batch_norms)
    )


@torch.no_grad()
def _moments(network: StatisticsNetwork, images: Tensor, at_once: int) -> Statistics:
    """Mean and variance of each batch norm's input over all images, a few of them at a time."""
    parts = images.split(at_once)
    shares = [len(part) / len(images) for part in parts]
    found = [network(part)[1] for part in parts]
    whole = []
    for of_norm in zip(*found, strict=True):
        mean = sum(share * m for share, (m, _) in zip(shares, of_norm, strict=True))
        square = sum(share * (v + m * m) for share, (m, v) in zip(shares, of_norm, strict=True))
        whole.append((mean, square - mean * mean))
    return whole


@torch.no_grad()
def _asked(teacher: Captured, images: Tensor, at_once: int) -> tuple[Any, Tensor]:
    """The teacher's outputs, and what enters its last layer as vectors [N, d].

    Feature maps [N, C, *] are averaged over their positions.
    """
    last = [n for n in teacher.network.graph.nodes if queries.has_weight(n)][-1]
    source = queries.input_of(last)
    network = with_features(teacher.network, [source])
    found = [network(part) for part in images.split(at_once)]
    features = torch.cat([features for _, (features,) in found])
    if features.ndim > 2:
        dims = [
            d for d in range(1, features.ndim) if d != queries.channel_dim(last) % features.ndim
        ]
        features = features.mean(dims)
    if teacher.classes is None:
        return None, features
    return torch.cat([outputs for outputs, _ in found]), features
