"""The accuracy drop of a run, measured or expected, and its level."""

from dataclasses import dataclass
from typing import Literal

from gdfq.report.read import Record, Run, number

Level = Literal["good", "fair", "poor", "unknown"]

MAX_GOOD_SHARE, MAX_FAIR_SHARE = 0.01, 0.05
"""Largest drops, as shares of the teacher's accuracy. MLPerf allows 1 % for quantized networks."""
_Z_95 = 1.96
"""Standard errors in half of a 95 % interval."""


@dataclass(frozen=True)
class Drop:
    """A drop of top-1 accuracy, with an interval.

    Attributes:
        kind: "measured" on test images, with a 95 % interval; or "expected"
            (`gdfq.analysis.accuracy_drop`), with an interval that holds in nine of ten cases.
        points: The drop in points.
        low: Lower end of the interval in points.
        high: Upper end of the interval in points.
        reference: The teacher's accuracy in percent; None if unknown.
    """

    kind: Literal["measured", "expected"]
    points: float
    low: float
    high: float
    reference: float | None

    def level(self) -> Level:
        """The level of a measured drop, or of the upper end of an expected one.

        It is unknown if one end of the interval is good and the other poor.
        """
        low, high = self._level_of(self.low), self._level_of(self.high)
        if (low, high) == ("good", "poor"):
            return "unknown"
        return high if self.kind == "expected" else self._level_of(self.points)

    def _level_of(self, points: float) -> Level:
        share = points / (100.0 if self.reference is None else max(self.reference, 1e-9))
        return "good" if share <= MAX_GOOD_SHARE else "fair" if share <= MAX_FAIR_SHARE else "poor"


def drop_of(run: Run) -> Drop | None:
    """The drop of a run: measured if there was a test, else expected; None if neither is known."""
    drop = run.drop
    if drop is not None:
        before = float(run.metrics["teacher"]["top1"])
        error = number(run.evidence.get("test", {}).get("error"))
        margin = _Z_95 * (error if error is not None else _unpaired_error(run.metrics))
        return Drop("measured", drop, drop - margin, drop + margin, before)
    trust = run.evidence.get("trust") or {}
    points, interval = number(trust.get("expected_drop")), trust.get("interval")
    if points is None or not interval:
        return None
    return Drop("expected", points, float(interval[0]), float(interval[1]), None)


def _unpaired_error(metrics: Record) -> float:
    """The standard error of a drop, in points, from the two accuracies alone.

    One correct and one wrong prediction are added for each network, so that the error is above 0
    for few images (A. Agresti and B. Caffo, 2000, "Simple and effective confidence intervals for
    proportions").
    """
    images = max(1, int(metrics.get("test_images", 1)))
    correct = (images * float(metrics[who]["top1"]) / 100 for who in ("teacher", "student"))
    shares = ((count + 1) / (images + 2) for count in correct)
    return 100 * float(sum(p * (1 - p) / (images + 2) for p in shares) ** 0.5)
