"""What quantization changed of the answers to labelled test images."""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gdfq.analysis.accuracy import Answers
from gdfq.analysis.images import thumbnails
from gdfq.analysis.observations import Tested
from gdfq.data.preprocessing import Preprocessing
from gdfq.data.tensors import network_inputs

BINS = 15
"""Of the calibration error, as in arXiv 1706.04599."""
_CONFUSIONS, _SHOWN = 10, 24


@dataclass(frozen=True)
class Calibration:
    """How confidence and accuracy agree, over bins of equal width of the confidence."""

    ece: float
    """Expected calibration error: Σ n_b/n |accuracy_b − confidence_b|, in percent."""
    counts: tuple[int, ...]
    accuracy: tuple[float, ...]
    confidence: tuple[float, ...]
    """Means of each bin, in 0..1; 0 of an empty one."""


@dataclass(frozen=True)
class Confusion:
    """Images of one class that are taken for another, before and after."""

    label: int
    answer: int
    teacher: int
    student: int


@dataclass(frozen=True)
class Flip:
    """A test image whose answer changed."""

    index: int
    label: int
    teacher: int
    student: int


@dataclass(frozen=True, eq=False)
class Changes:
    """All of it; accuracies in percent. `pictures` [n, C, h, w] are of the first flips."""

    images: int
    teacher: float
    student: float
    lost: int
    """Images that were right and are wrong now."""
    won: int
    """Images that were wrong and are right now."""
    moved: int
    """Images that are wrong in another way."""
    drop: float
    """Points of accuracy that are gone."""
    error: float
    """Standard error of the drop, of paired answers."""
    by_class: tuple[tuple[int, int, float, float], ...]
    """Class, its images, accuracy before, accuracy after."""
    confusions: tuple[Confusion, ...]
    """Those that grew most."""
    calibration: dict[str, Calibration]
    flips: tuple[Flip, ...]
    fingerprint: str
    """Of labels and the teacher's answers: equal for the same test of the same network."""
    pictures: np.ndarray[Any, Any]


def measure_changes(tested: Tested, preprocessing: Preprocessing) -> Changes:
    """Compare teacher and student on the test images that a run was given."""
    labels, was, now = tested.labels, tested.teacher.classes, tested.student.classes
    was_right, is_right = was == labels, now == labels
    lost, won = int((was_right & ~is_right).sum()), int((~was_right & is_right).sum())
    drop, error = paired_drop(lost, won, len(labels))
    flips = _flips(labels, was, now)
    indices = torch.tensor([flip.index for flip in flips[:_SHOWN]], dtype=torch.long)
    shown = torch.zeros(0)
    if len(indices):
        shown, *_ = network_inputs(tested.data, indices, preprocessing)
    return Changes(
        images=len(labels),
        teacher=tested.teacher.top1(labels),
        student=tested.student.top1(labels),
        lost=lost,
        won=won,
        moved=int((~was_right & ~is_right & (was != now)).sum()),
        drop=drop,
        error=error,
        by_class=_by_class(labels, was_right, is_right),
        confusions=grown_confusions(labels, was, now),
        calibration={
            "teacher": calibration(tested.teacher, labels),
            "student": calibration(tested.student, labels),
        },
        flips=flips[:_SHOWN],
        fingerprint=_fingerprint(labels, was),
        pictures=thumbnails(shown, preprocessing),
    )


def paired_drop(lost: int, won: int, images: int) -> tuple[float, float]:
    """The drop in points, and its standard error, of answers to the same n images.

    With b lost and c won the drop is (b − c)/n. The error is that of one more of each, so that
    few images without a change do not make it certain (D. Bonett and R. Price, 2012, "Adjusted
    Wald confidence interval ... based on paired data"): p = (b + 1)/(n + 2), q = (c + 1)/(n + 2),
    √((p + q − (p − q)²)/(n + 2)).
    """
    p, q = (lost + 1) / (images + 2), (won + 1) / (images + 2)
    error = ((p + q - (p - q) ** 2) / (images + 2)) ** 0.5
    return 100 * (lost - won) / images, 100 * error


def calibration(answers: Answers, labels: Tensor) -> Calibration:
    """The calibration of answers to images of the given labels [N] (arXiv 1706.04599)."""
    confidence = answers.confidence.double()
    right = (answers.classes == labels).double()
    bins = (confidence * BINS).ceil().long().clamp(1, BINS) - 1  # (0, 1/15], (1/15, 2/15], ...
    counts = torch.bincount(bins, minlength=BINS)
    some = counts.clamp(min=1)
    accuracy = torch.bincount(bins, right, BINS) / some
    mean = torch.bincount(bins, confidence, BINS) / some
    ece = float((counts * (accuracy - mean).abs()).sum()) / len(labels)
    return Calibration(
        100 * ece, tuple(counts.tolist()), tuple(accuracy.tolist()), tuple(mean.tolist())
    )


def grown_confusions(labels: Tensor, was: Tensor, now: Tensor) -> tuple[Confusion, ...]:
    """The mistakes (label, answer) that the student makes more often than the teacher did."""

    def mistakes(answers: Tensor) -> dict[tuple[int, int], int]:
        wrong = answers != labels
        pairs = torch.stack([labels[wrong], answers[wrong]], 1)
        found, counts = pairs.unique(dim=0, return_counts=True)
        return {(a, b): n for (a, b), n in zip(found.tolist(), counts.tolist(), strict=True)}

    before, after = mistakes(was), mistakes(now)
    grown = [
        Confusion(*pair, before.get(pair, 0), count)
        for pair, count in after.items()
        if count > before.get(pair, 0)
    ]
    grown.sort(key=lambda c: (c.teacher - c.student, c.label, c.answer))
    return tuple(grown[:_CONFUSIONS])


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
    """All changed answers; those that were right come first."""
    changed = (was != now).nonzero().flatten().tolist()
    changed.sort(key=lambda i: (bool(was[i] != labels[i]), i))
    return tuple(Flip(i, int(labels[i]), int(was[i]), int(now[i])) for i in changed)


def _fingerprint(labels: Tensor, answers: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in (labels, answers):
        digest.update(tensor.long().numpy().tobytes())
    return digest.hexdigest()
