"""Predictions of the student beside those of the teacher."""

import math

import pytest
import torch

from gdfq.analysis import observations, predictions
from gdfq.analysis.accuracy import Predictions
from gdfq.data.datasets import ArrayData
from gdfq.data.preprocessing import Preprocessing

UNIT = Preprocessing((0.0,), (1.0,))


def test_paired_drop_matches_a_hand_computed_error() -> None:
    # 2 points of 1000, 30 - 10; with one more of each 31 and 11 of 1002.
    drop, error = predictions.paired_drop(30, 10, 1000)
    assert drop == pytest.approx(2)
    assert error == pytest.approx(100 * math.sqrt((42 / 1002 - (20 / 1002) ** 2) / 1002))
    # No change in 40 images: the error is not 0.
    assert predictions.paired_drop(0, 0, 40) == pytest.approx((0, 100 * math.sqrt(2) / 42))


def test_calibration_matches_a_hand_computed_error() -> None:
    predicted = Predictions(torch.tensor([0, 0, 0, 0]), torch.tensor([0.95, 0.97, 0.5, 0.52]))
    found = predictions.calibration(predicted, torch.tensor([0, 1, 0, 0]))
    # Bins of 1/15: half of {0.95, 0.97} correct; 0.5 and 0.52 both in (7/15, 8/15] and correct.
    assert found.counts[14] == found.counts[7] == 2
    assert found.ece == pytest.approx(100 * (2 * abs(0.5 - 0.96) + 2 * abs(1 - 0.51)) / 4, abs=1e-4)
    sure = Predictions(torch.tensor([1]), torch.tensor([1.0]))
    assert predictions.calibration(sure, torch.tensor([1])).ece == 0


def test_changes_match_hand_computed_flips_and_confusions() -> None:
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    was = torch.tensor([0, 0, 1, 1, 0, 0])
    now = torch.tensor([1, 1, 1, 1, 1, 1])
    pixels = torch.zeros(6, 1, 4, 4, dtype=torch.uint8)
    sure = torch.ones(6)
    tested = observations.TestPredictions(
        ArrayData(pixels, labels), labels, Predictions(was, sure), Predictions(now, sure)
    )
    found = predictions.measure_changes(tested, UNIT)
    assert (found.lost, found.gained, found.still_wrong) == (2, 1, 1)
    assert (found.teacher, found.student) == pytest.approx((50, 100 / 3))
    assert [flip.index for flip in found.flips] == [0, 1, 4, 5]  # lost images first
    assert found.pictures.shape == (4, 1, 4, 4)
    assert [(c.label, c.prediction, c.teacher, c.student) for c in found.confusions] == [
        (0, 1, 1, 3),
        (2, 1, 0, 1),
    ]
    assert len(found.by_class) == 3
    assert found.by_class[0] == pytest.approx((0, 3, 200 / 3, 0))
    assert found.by_class[1:] == ((1, 2, 50, 100), (2, 1, 0, 0))
