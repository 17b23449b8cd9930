"""How similar the outputs of a student and its teacher are, by the kind of each output."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gdfq.graph.ends import Ends

_MIN_POWER = 1e-30


@dataclass(frozen=True)
class Similarity:
    """How similar one output of a student is to its teacher's.

    Attributes:
        relative_error: ‖ŷ − y‖ / ‖y‖ in percent over all numbers. Logits in front of a softmax,
            whose mean over the classes changes no probability, are centred first. For logits in
            front of a sigmoid ‖y‖ is that of y minus its mean in each channel: an offset, which
            rare labels have, is no signal.
        cosine: Mean cosine of the vectors [N, C]; None if they are not unit vectors.
        decisions: Share of logits with the same sign in percent, which are probabilities on the
            same side of one half; None if no sigmoid follows.
    """

    relative_error: float
    cosine: float | None = None
    decisions: float | None = None


def compare_outputs(
    expected: Sequence[Tensor], actual: Sequence[Tensor], ends: Ends, *, is_classifier: bool = False
) -> list[Similarity]:
    """Compare outputs [N, ...] of a teacher's body with those of its student.

    Args:
        expected: The teacher's outputs.
        actual: The student's outputs.
        ends: What follows them in the teacher.
        is_classifier: Whether the only output is the logits of classes [N, C].
    """
    totals = Totals(ends, is_classifier=is_classifier)
    totals.add_(expected, actual)
    return totals.similarities()


class Totals:
    """Sums over batches of outputs, from which their similarities follow."""

    def __init__(self, ends: Ends, *, is_classifier: bool = False) -> None:
        self._ends = ends
        self._is_classifier = is_classifier
        self._sums: list[Tensor] = []

    @torch.no_grad()
    def add_(self, expected: Sequence[Tensor], actual: Sequence[Tensor]) -> None:
        """Add the outputs [N, ...] of a batch."""
        sums = [self._of(i, *pair) for i, pair in enumerate(zip(expected, actual, strict=True))]
        if self._sums:
            sums = [old + new for old, new in zip(self._sums, sums, strict=True)]
        self._sums = sums

    def _of(self, index: int, expected: Tensor, actual: Tensor) -> Tensor:
        """Sums of errors, powers, cosines and equal signs; numbers of images and of elements.

        The sums of each channel follow.
        """
        y, z = expected.double(), actual.double()
        signs = ((y > 0) == (z > 0)).sum()
        cosines = F.cosine_similarity(y.reshape(len(y), -1), z.reshape(len(z), -1)).sum()
        dim = 1 if self._is_classifier else self._ends.softmax_dim(index)
        if dim is not None:
            y, z = (x - x.mean(dim, keepdim=True) for x in (y, z))
        sums = [(z - y).square().sum(), y.square().sum(), cosines, signs.double()]
        counts = sums[0].new_tensor([len(y), y.numel()])
        by_channel = y.reshape(len(y), y.shape[1] if y.ndim > 1 else 1, -1).sum((0, 2))
        return torch.cat([torch.stack(sums), counts, by_channel]).cpu()

    def similarities(self) -> list[Similarity]:
        """Return the similarity of each output over all batches."""
        found = []
        for index, sums in enumerate(self._sums):
            error, power, cosines, signs, images, count, *channels = sums.tolist()
            kind = self._ends.kinds[index] if self._ends.kinds else "values"
            in_channel = count / len(channels)
            if kind == "sigmoid" and in_channel > 1:
                power -= sum(channel**2 for channel in channels) / in_channel
            found.append(
                Similarity(
                    100 * (error / max(power, _MIN_POWER)) ** 0.5,
                    cosine=cosines / images if kind == "unit_norm" else None,
                    decisions=100 * signs / count if kind == "sigmoid" else None,
                )
            )
        return found
