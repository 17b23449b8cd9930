"""Quality of synthetic images: statistics, classes and diversity, compared with noise."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gdfq.analysis.work import Work
from gdfq.data.preprocessing import Preprocessing
from gdfq.execution.budget import MemoryBudget
from gdfq.execution.distributed import Statistics
from gdfq.functional.losses import relative_statistics_loss
from gdfq.graph import queries
from gdfq.graph.batch_norms import batch_norm_name
from gdfq.graph.blocks import with_features
from gdfq.graph.capture import Captured
from gdfq.graph.memory import forward_images
from gdfq.graph.statistics import StatisticsNetwork
from gdfq.sources.noise import noise_like_inputs

_MAX_CLASSES, _IMAGES_PER_CLASS = 10, 4
"""The classes and images per class that the report shows."""
_MAX_BATCH_IMAGES = 32
"""Largest batch; larger ones are not faster."""
_MAX_SIDE_PIXELS = 64
"""Longest side of a thumbnail."""


@dataclass(frozen=True)
class Distance:
    """Distance of observed statistics from the target statistics of one batch norm.

    mean_c [((μ̂ − μ)/σ)² + (σ̂/σ − 1)²] (`gdfq.functional.losses.relative_statistics_loss`): 0 means
    equal.

    Attributes:
        name: The batch norm.
        synthetic: Distance of the synthetic (or given) images.
        white: Distance of white noise with the scale of `estimate_input_statistics`.
        natural: Distance of noise with these input statistics and the spectrum of natural images,
            1/f^1.5.
    """

    name: str
    synthetic: float
    white: float
    natural: float


@dataclass(frozen=True)
class Classes:
    """The teacher's predictions for the synthetic images.

    Attributes:
        predicted: Number of classes that are predicted at least once.
        possible: Largest possible number of predicted classes: that of all classes, or of the
            images if there are fewer.
        as_labelled: Share of the images whose predicted class is their label, in percent.
        confidence: Mean probability of the predicted classes, in percent.
    """

    predicted: int
    possible: int
    as_labelled: float
    confidence: float


@dataclass(frozen=True)
class Diversity:
    """Diversity of images: root mean square distances of pairs, as ratios.

    Attributes:
        pixels: Distance in pixels, relative to that of unrelated images (see `spread`).
        features: Distance of the inputs of the last layer, relative to that of 1/f noise.
        within_class: Distance in features of pairs of one class, relative to that of all pairs;
            None without such pairs.
    """

    pixels: float
    features: float
    within_class: float | None


@dataclass(frozen=True, eq=False)
class Images:
    """All measures of the images, and pixels to show.

    Attributes:
        count: Number of images that were measured.
        distances: Distance of statistics for each batch norm, from input to output.
        classes: The teacher's predictions; None without classes.
        diversity: Diversity of the images.
        clipped: Share of the pixels outside 0..255, in percent.
        nearest: The noise whose statistics are nearest to the network's: "white" or "natural".
        grid: Pixels to show [n, C, h, w], ordered by class.
        labels: Their labels [n].
        noise: Pixels of the nearest noise.
    """

    count: int
    distances: tuple[Distance, ...]
    classes: Classes | None
    diversity: Diversity
    clipped: float
    nearest: str
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
    """Measure synthetic (or given) images with the teacher, and as many images of noise.

    Args:
        teacher: The teacher.
        images: Normalised images [N, *input_shape].
        labels: Their labels [N]; None without classes.
        preprocessing: The normalisation of the images.
        memory: Limits the batch.
    """
    images = images.to(teacher.device)
    noises = {
        kind: noise.to(images) for kind, noise in noise_like_inputs(len(images), teacher).items()
    }
    batch = min(_MAX_BATCH_IMAGES, forward_images(teacher.network.graph, memory, teacher.device))
    distances = _distances(teacher, images, noises, batch)
    nearest = min(noises, key=lambda kind: sum(getattr(d, kind) for d in distances))
    outputs, features = _outputs_and_features(teacher, images, batch)
    _, noise_features = _outputs_and_features(teacher, noises["natural"], batch)
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
            features=distance_of_pairs(features) / max(distance_of_pairs(noise_features), 1e-12),
            within_class=None if labels is None else within_classes(features, labels),
        ),
        clipped=clipped(images, preprocessing),
        nearest=nearest,
        grid=thumbnails(images[chosen], preprocessing),
        labels=np.array([]) if labels is None else labels[chosen].cpu().numpy(),
        noise=thumbnails(noises[nearest][: min(len(chosen), _MAX_CLASSES)], preprocessing),
    )


_PASSES = 5
"""Of each image: for the statistics of images and two kinds of noise, and for features of two."""


def images_work(count: int) -> Work:
    """Return how much work `measure_images` is for so many images."""
    return Work(teacher=_PASSES * count)


def coverage(logits: Tensor, labels: Tensor) -> Classes:
    """The coverage of classes by the teacher's logits [N, C] for images with labels [N]."""
    confidence, predictions = logits.softmax(1).max(1)
    return Classes(
        predicted=len(predictions.unique()),
        possible=min(logits.shape),
        as_labelled=100 * float((predictions == labels.to(predictions.device)).double().mean()),
        confidence=100 * float(confidence.double().mean()),
    )


def spread(images: Tensor) -> float:
    """Diversity of pixels √(V_b / V) of images [N, ...].

    V_b is the variance of a pixel between the images, averaged over pixels; V is the variance of
    all numbers. The result is 1 for images with nothing but their mean in common, 0 for equal
    images.
    """
    flat = images.flatten(1).double()
    total = float(flat.var(correction=0))
    between = float(flat.var(0, correction=0).mean())
    return (between / total) ** 0.5 if total > 0 else 0.0


def distance_of_pairs(features: Tensor) -> float:
    """Root mean square distance of all pairs of different rows of [N, d]; 0 for a single row."""
    if len(features) < 2:
        return 0.0
    distance: float = float(F.pdist(features.double()).square().mean()) ** 0.5
    return distance


def within_classes(features: Tensor, labels: Tensor) -> float | None:
    """The distance of pairs of rows [N, d] with equal labels [N], relative to that of all pairs.

    None if no label occurs twice or if all rows are equal.
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
    """Share of the pixels of normalised images, in percent, that are below 0 or above 255.

    Args:
        images: [N, C, *size], normalised.
        preprocessing: How they were normalised.
    """
    shape = (1, -1, *[1] * (images.ndim - 2))
    mean, std = (torch.tensor(v).view(shape) for v in (preprocessing.mean, preprocessing.std))
    unit = images.cpu() * std + mean
    half = 0.5 / 255  # rounds to 0 or 255
    return 100 * float(((unit < -half) | (unit > 1 + half)).double().mean())


def by_class(labels: Tensor | None, count: int) -> list[int]:
    """Indices of the images to show: four of each of ten classes; without labels the first.

    Args:
        labels: [N], if the images have any.
        count: N.
    """
    if labels is None:
        return list(range(min(count, _MAX_CLASSES * _IMAGES_PER_CLASS)))
    shown = [label for label, _ in Counter(labels.tolist()).most_common(_MAX_CLASSES)]
    places = {label: (labels == label).nonzero().flatten().tolist() for label in sorted(shown)}
    return [index for indices in places.values() for index in indices[:_IMAGES_PER_CLASS]]


def thumbnails(images: Tensor, preprocessing: Preprocessing) -> np.ndarray[Any, Any]:
    """Pixels uint8 [N, C, h, w] of normalised images, with no side longer than 64.

    Inputs other than images of one or three channels give an empty array [0].

    Args:
        images: [N, C, h, w], normalised.
        preprocessing: How they were normalised.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        return np.zeros(0, np.uint8)
    longest = max(images.shape[2:])
    if longest > _MAX_SIDE_PIXELS:
        size = [max(1, round(side * _MAX_SIDE_PIXELS / longest)) for side in images.shape[2:]]
        images = F.interpolate(images.float(), size, mode="area")
    return preprocessing.pixels(images).numpy()


def _distances(
    teacher: Captured, images: Tensor, noises: dict[str, Tensor], batch: int
) -> tuple[Distance, ...]:
    """The distances for each batch norm, from input to output; empty without batch norms."""
    if not teacher.batch_norms:
        return ()
    network = StatisticsNetwork(teacher)
    kinds = {"synthetic": images, **noises}
    observed = {kind: _moments(network, given, batch) for kind, given in kinds.items()}
    return tuple(
        Distance(
            batch_norm_name(node),
            **{
                kind: float(relative_statistics_loss([moments[index]], [network.stored[index]]))
                for kind, moments in observed.items()
            },
        )
        for index, node in enumerate(teacher.batch_norms)
    )


@torch.no_grad()
def _moments(network: StatisticsNetwork, images: Tensor, batch: int) -> Statistics:
    """Mean and variance of the input of each batch norm over all images, computed in batches."""
    parts = images.split(batch)
    shares = [len(part) / len(images) for part in parts]
    found = [network(part)[1] for part in parts]
    whole = []
    for of_norm in zip(*found, strict=True):
        mean = sum(share * m for share, (m, _) in zip(shares, of_norm, strict=True))
        square = sum(share * (v + m * m) for share, (m, v) in zip(shares, of_norm, strict=True))
        whole.append((mean, square - mean * mean))
    return whole


@torch.no_grad()
def _outputs_and_features(teacher: Captured, images: Tensor, batch: int) -> tuple[Any, Tensor]:
    """The teacher's outputs (None without classes), and the inputs of its last layer [N, d].

    Feature maps [N, C, *] are averaged over their positions.
    """
    last = [n for n in teacher.network.graph.nodes if queries.has_weight(n)][-1]
    source = queries.input_of(last)
    network = with_features(teacher.network, [source])
    found = [network(part) for part in images.split(batch)]
    features = torch.cat([features for _, (features,) in found])
    if features.ndim > 2:
        dims = [
            d for d in range(1, features.ndim) if d != queries.channel_dim(last) % features.ndim
        ]
        features = features.mean(dims)
    if teacher.classes is None:
        return None, features
    return torch.cat([outputs for outputs, _ in found]), features
