"""Examples of images from elsewhere, kept and dropped, with their scores."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gdfq.analysis.images import thumbnails
from gdfq.sources.candidates import FILTERS, KEPT, VERDICTS, Candidates, Screening

_EXAMPLES = 16
"""Images of each kind that the report shows."""


@dataclass(frozen=True)
class Example:
    """A candidate.

    Attributes:
        index: Its place among the candidates.
        verdict: "kept", or the filter that dropped it.
        energy: Its energy; None without classes.
        score: Its sensitivity or entropy; None if the energy had decided.
    """

    index: int
    verdict: str
    energy: float | None
    score: float | None


@dataclass(frozen=True, eq=False)
class CandidateExamples:
    """What the report shows of images from elsewhere.

    Attributes:
        sentence: What was kept, and why the others were not.
        facts: The same as numbers, with the batch-norm distances of all pools.
        kept: Some that passed all filters, in the order in which they were judged.
        dropped: Some that were dropped, from each filter.
        kept_images: Their pixels uint8 [n, C, h, w].
        dropped_images: Their pixels uint8 [n, C, h, w].
    """

    sentence: str
    facts: dict[str, Any]
    kept: tuple[Example, ...]
    dropped: tuple[Example, ...]
    kept_images: np.ndarray[Any, Any]
    dropped_images: np.ndarray[Any, Any]


def measure_candidates(candidates: Candidates, screening: Screening) -> CandidateExamples:
    """Return examples of what the screen kept and dropped.

    Args:
        candidates: The images.
        screening: What was found of them.
    """
    places = {name: screening.of(name)[:_EXAMPLES] for name in VERDICTS}
    used = [name for name in FILTERS if len(places[name])]
    each = -(-_EXAMPLES // max(1, len(used)))
    dropped = torch.cat([places[KEPT][:0], *(places[name][:each] for name in used)])
    return CandidateExamples(
        str(screening),
        screening.as_values(),
        _examples(screening, places[KEPT]),
        _examples(screening, dropped),
        _pixels(candidates, screening.judged[places[KEPT]]),
        _pixels(candidates, screening.judged[dropped]),
    )


def _examples(screening: Screening, places: Tensor) -> tuple[Example, ...]:
    def number(values: Tensor, place: int) -> float | None:
        found = float(values[place]) if len(values) else math.nan
        return None if math.isnan(found) else found

    return tuple(
        Example(
            int(screening.judged[place]),
            VERDICTS[int(screening.verdicts[place])],
            number(screening.energies, place),
            number(screening.scores, place),
        )
        for place in places.tolist()
    )


def _pixels(candidates: Candidates, chosen: Tensor) -> np.ndarray[Any, Any]:
    if not len(chosen):
        return np.zeros(0, np.uint8)
    images = candidates.images(chosen, torch.device("cpu"))
    return thumbnails(images, candidates.preprocessing)
