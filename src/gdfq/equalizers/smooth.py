"""Smoothing: outliers of activations move into the weights, channel by channel."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from gdfq.equalizers.base import StreamEqualizer
from gdfq.equalizers.structure import Structure, product_of
from gdfq.equalizers.weights import BIAS, WEIGHT, Changes
from gdfq.files.plain_values import tagged
from gdfq.graph import queries
from gdfq.graph.capture import Captured
from gdfq.graph.walk import Walk
from gdfq.student.scheme import Scheme


@tagged("Smooth")
@dataclass(frozen=True)
class Smooth(StreamEqualizer):
    """Divides channels by s_j = max|X_j|^α / max|W_j|^(1 − α) (SmoothQuant, arXiv 2211.10438).

    The divisors fold into the weight of the norm, or of the up projection, that makes the channels;
    the layers that read them are multiplied by s.

    Attributes:
        strength: α: 0 leaves the activations as they are, 1 moves all of their outliers.
    """

    strength: float = 0.5

    @property
    def folds(self) -> bool:
        """Whether weights alone change: they do."""
        return True

    @torch.no_grad()
    def equal(
        self, teacher: Captured, scheme: Scheme, inputs: Sequence[Tensor], seed: int
    ) -> Captured:
        """Return the smoothed teacher."""
        del scheme, seed
        structure, changes = Structure.of(teacher.network.graph), Changes(teacher)
        found = list(_places(structure))
        peaks = _peaks(teacher, {readers[0] for _, _, readers in found}, inputs)
        for maker, place, readers in found:
            largest = [changes.constant(reader, WEIGHT).abs().amax(0) for reader in readers]
            divisor = self._divisors(peaks[readers[0]], torch.stack(largest).amax(0))
            value = changes.constant(maker, place)
            changes.set(maker, place, value / (divisor if value.ndim == 1 else divisor[:, None]))
            if queries.has_weight(maker) and changes.has(maker, BIAS):
                changes.set(maker, BIAS, changes.constant(maker, BIAS) / divisor)
            for reader in readers:
                changes.set(reader, WEIGHT, changes.constant(reader, WEIGHT) * divisor)
        return changes.applied()

    def _divisors(self, peaks: Tensor, largest: Tensor) -> Tensor:
        """Return s [C]; channels that are always 0, or that no weight reads, stay."""
        divisors = peaks**self.strength / largest ** (1 - self.strength)
        return torch.where((peaks > 0) & (largest > 0), divisors, 1.0)


def _places(structure: Structure) -> Iterator[tuple[fx.Node, int, tuple[fx.Node, ...]]]:
    """Yield what makes channels: a node, the place of its constant, and the layers that read it."""
    for norm in structure.norms:
        if norm.weight is not None:
            place = next(i for i, argument in enumerate(norm.node.args) if argument is norm.weight)
            yield norm.node, place, norm.readers
    for product in filter(None, map(product_of, structure.writers)):
        yield product.factor, WEIGHT, (product.writer,)


def _peaks(
    teacher: Captured, layers: set[fx.Node], inputs: Sequence[Tensor]
) -> dict[fx.Node, Tensor]:
    """Return the largest magnitude of each channel [C] of the inputs of layers."""
    return {
        visit.node: visit.inputs[0].abs().flatten(0, -2).amax(0).double()
        for visit in Walk(teacher.network).visits(*inputs)
        if visit.node in layers
    }
