"""What the report says of a language model."""

import math
from dataclasses import dataclass
from typing import Literal

from gdfq.report.drop import MAX_FAIR_SHARE, MAX_GOOD_SHARE, Level
from gdfq.report.read import Run, number


@dataclass(frozen=True)
class PerplexityRise:
    """By how much the perplexity of a run rises.

    Attributes:
        kind: "measured" on test text, or "expected" of held-out own text: exp(KL) - 1, because the
            cross-entropy on text that the teacher writes rises by the KL.
        share: The rise, as a share of the original's perplexity.
        divergence: KL in nats a token.
        agreement: Tokens with the same first choice, in percent.
    """

    kind: Literal["measured", "expected"]
    share: float
    divergence: float
    agreement: float

    @property
    def level(self) -> Level:
        """Good, fair or poor, by the shares that count for accuracies."""
        good, fair = self.share <= MAX_GOOD_SHARE, self.share <= MAX_FAIR_SHARE
        return "good" if good else "fair" if fair else "poor"

    @property
    def sentence(self) -> str:
        """The rise in words."""
        rise = f"{100 * self.share:.1f} % higher"
        what = {
            "measured": f"The perplexity on the test text is {rise}",
            "expected": f"The perplexity on held-out own text is exp(KL) - 1 = {rise}",
        }
        return (
            f"{what[self.kind]}: KL {self.divergence:.4f} nats a token, same first choice for "
            f"{self.agreement:.1f} % of the tokens"
        )


def is_language_model(run: Run) -> bool:
    """Return whether a run is of a language model."""
    return "own_text" in run.metrics


def rise_of(run: Run) -> PerplexityRise | None:
    """Return the rise of a run's perplexity; None for other networks, or where it is not known."""
    test, own = (run.metrics.get(name) or {} for name in ("language", "own_text"))
    found = test or own
    divergence, agreement = number(found.get("divergence")), number(found.get("agreement"))
    if divergence is None or agreement is None:
        return None
    if not test:
        return PerplexityRise("expected", math.expm1(min(divergence, 50.0)), divergence, agreement)
    after, before = number(test.get("perplexity")), number(test.get("teacher_perplexity"))
    if after is None or not before:
        return None
    return PerplexityRise("measured", after / before - 1, divergence, agreement)
