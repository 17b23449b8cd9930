"""Changes of the predictions for labelled test images by quantization."""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gdfq.analysis.accuracy import Predictions
from gdfq.analysis.images import thumbnails
from gdfq.analysis.observations import TestPredictions
from gdfq.data.preprocessing import Preprocessing
from gdfq.data.tensors import network_inputs

BINS = 15
"""Confidence bins of the calibration error (arXiv 1706.04599)."""
_MAX_CONFUSIONS = 10
_MAX_IMAGES_SHOWN = 24


@dataclass(frozen=True)
class Calibration:
    """Accuracy by confidence, in bins of equal width.

    Attributes:
        ece: Expected calibration error Σ n_b/n |accuracy_b − confidence_b|, in percent.
        counts: Number of images in each bin.
        accuracy: Accuracy in each bin, in 0..1; 0 for an empty bin.
        confidence: Mean confidence in each bin, in 0..1; 0 for an empty bin.
    """

    ece: float
    counts: tuple[int, ...]
    accuracy: tuple[float, ...]
    confidence: tuple[float, ...]


@dataclass(frozen=True)
class Confusion:
    """How often images of one class are predicted as another class.

    Attributes:
        label: The class of the images.
        prediction: The predicted class.
        teacher: Number of such predictions by the teacher.
        student: Number of such predictions by the student.
    """

    label: int
    prediction: int
    teacher: int
    student: int


@dataclass(frozen=True)
class Flip:
    """A test image whose predicted class changed.

    Attributes:
        index: Index of the image.
        label: Its class.
        teacher: The class that the teacher predicts.
        student: The class that the student predicts.
    """

    index: int
    label: int
    teacher: int
    student: int


@dataclass(frozen=True, eq=False)
class Changes:
    """All changes of the predictions.

    Attributes:
        images: Number of test images.
        teacher: Accuracy of the teacher, in percent.
        student: Accuracy of the student, in percent.
        lost: Number of images that only the teacher classifies correctly.
        gained: Number of images that only the student classifies correctly.
        still_wrong: Number of images that both classify wrongly, as different classes.
        drop: Drop of the accuracy in points.
        error: Standard error of the drop of paired predictions, in points.
        by_class: Class, number of images, accuracy of teacher and student in percent.
        confusions: The confusions that increased most.
        calibration: Calibration of "teacher" and "student".
        flips: The first images whose predicted class changed.
        fingerprint: SHA-256 of labels and teacher predictions, which is equal for the same test of
            the same network.
        pictures: Pixels of the flipped images [n, C, h, w].
    """

    images: int
    teacher: float
    student: float
    lost: int
    gained: int
    still_wrong: int
    drop: float
    error: float
    by_class: tuple[tuple[int, int, float, float], ...]
    confusions: tuple[Confusion, ...]
    calibration: dict[str, Calibration]
    flips: tuple[Flip, ...]
    fingerprint: str
    pictures: np.ndarray[Any, Any]


def measure_changes(tested: TestPredictions, preprocessing: Preprocessing) -> Changes:
    """Compare the predictions of teacher and student for the test images of a run."""
    labels, was, now = tested.labels, tested.teacher.classes, tested.student.classes
    was_right, is_right = was == labels, now == labels
    lost, gained = int((was_right & ~is_right).sum()), int((~was_right & is_right).sum())
    drop, error = paired_drop(lost, gained, len(labels))
    flips = _flips(labels, was, now)
    indices = torch.tensor([flip.index for flip in flips[:_MAX_IMAGES_SHOWN]], dtype=torch.long)
    shown = torch.zeros(0)
    if len(indices):
        shown, *_ = network_inputs(tested.data, indices, preprocessing)
    return Changes(
        images=len(labels),
        teacher=tested.teacher.top1(labels),
        student=tested.student.top1(labels),
        lost=lost,
        gained=gained,
        still_wrong=int((~was_right & ~is_right & (was != now)).sum()),
        drop=drop,
        error=error,
        by_class=_by_class(labels, was_right, is_right),
        confusions=grown_confusions(labels, was, now),
        calibration={
            "teacher": calibration(tested.teacher, labels),
            "student": calibration(tested.student, labels),
        },
        flips=flips[:_MAX_IMAGES_SHOWN],
        fingerprint=_fingerprint(labels, was),
        pictures=thumbnails(shown, preprocessing),
    )


def paired_drop(lost: int, gained: int, images: int) -> tuple[float, float]:
    """The drop of the accuracy and its standard error, in points, on the same n images.

    With b lost and c gained images the drop is (b − c)/n. The standard error is
    √((p + q − (p − q)²)/(n + 2)) with p = (b + 1)/(n + 2), q = (c + 1)/(n + 2). The added images
    keep it above 0 when few images are tested and none changes (D. Bonett and R. Price, 2012,
    "Adjusted Wald confidence interval ... based on paired data").

    Args:
        lost: b, images that the teacher alone classifies correctly.
        gained: c, images that the student alone classifies correctly.
        images: n, all images.
    """
    p, q = (lost + 1) / (images + 2), (gained + 1) / (images + 2)
    error = ((p + q - (p - q) ** 2) / (images + 2)) ** 0.5
    return 100 * (lost - gained) / images, 100 * error


def calibration(predictions: Predictions, labels: Tensor) -> Calibration:
    """The calibration of predictions for images with labels [N] (arXiv 1706.04599)."""
    confidence = predictions.confidence.double()
    right = (predictions.classes == labels).double()
    bins = (confidence * BINS).ceil().long().clamp(1, BINS) - 1  # (0, 1/15], (1/15, 2/15], ...
    counts = torch.bincount(bins, minlength=BINS)
    divisors = counts.clamp(min=1)
    accuracy = torch.bincount(bins, right, BINS) / divisors
    mean = torch.bincount(bins, confidence, BINS) / divisors
    ece = float((counts * (accuracy - mean).abs()).sum()) / len(labels)
    return Calibration(
        100 * ece, tuple(counts.tolist()), tuple(accuracy.tolist()), tuple(mean.tolist())
    )


def grown_confusions(labels: Tensor, was: Tensor, now: Tensor) -> tuple[Confusion, ...]:
    """The confusions that the student makes more often than the teacher, largest increase first.

    Args:
        labels: Labels [N].
        was: Predictions of the teacher [N].
        now: Predictions of the student [N].
    """

    def confusions(predictions: Tensor) -> dict[tuple[int, int], int]:
        wrong = predictions != labels
        pairs = torch.stack([labels[wrong], predictions[wrong]], 1)
        found, counts = pairs.unique(dim=0, return_counts=True)
        return {(a, b): n for (a, b), n in zip(found.tolist(), counts.tolist(), strict=True)}

    before, after = confusions(was), confusions(now)
    grown = [
        Confusion(*pair, before.get(pair, 0), count)
        for pair, count in after.items()
        if count > before.get(pair, 0)
    ]
    grown.sort(key=lambda c: (c.teacher - c.student, c.label, c.prediction))
    return tuple(grown[:_MAX_CONFUSIONS])


def _by_class(
    labels: Tensor, was_right: Tensor, is_right: Tensor
) -> tuple[tuple[int, int, float, float], ...]:
    counts = torch.bincount(labels)
    before, after = (
        100 * torch.bincount(labels, right.double(), len(counts)) / counts.clamp(min=1)
        for right in (was_right, is_right)
    )
    rows = zip(counts.tolist(), before.tolist(), after.tolist(), strict=True)
    return tuple((c, n, a, b) for c, (n, a, b) in enumerate(rows) if n)


def _flips(labels: Tensor, was: Tensor, now: Tensor) -> tuple[Flip, ...]:
    """All changed predictions; lost images come first."""
    changed = (was != now).nonzero().flatten().tolist()
    changed.sort(key=lambda i: (bool(was[i] != labels[i]), i))
    return tuple(Flip(i, int(labels[i]), int(was[i]), int(now[i])) for i in changed)


def _fingerprint(labels: Tensor, predictions: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in (labels, predictions):
        digest.update(tensor.long().numpy().tobytes())
    return digest.hexdigest()
