"""Reassembly: channels with outliers are split, similar ones merged (QLLM, arXiv 2310.08041)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from gdfq.equalizers.base import Equalizer
from gdfq.equalizers.weights import WEIGHT, Changes
from gdfq.files.plain_values import tagged
from gdfq.functional.grid import fake_quantize, fake_quantize_tokens, symmetric_grid
from gdfq.functional.reassembly import Channels, new_channels, reassembled
from gdfq.graph import operators, queries
from gdfq.graph.capture import Captured
from gdfq.graph.walk import Walk
from gdfq.student.placement import layer_input_bits
from gdfq.student.scheme import Scheme

_SAMPLES = 2048
"""Tokens that the channels are chosen on."""


@tagged("Reassembly")
@dataclass(frozen=True)
class Reassembly(Equalizer):
    """Splits and merges the input channels of each layer that reads rounded tokens.

    The threshold of a layer is the one whose rounded outputs have the least error; the width stays.
    Splitting is exact, merging is not: similar channels become their mean.

    Attributes:
        thresholds: Thresholds that are tried, as shares of the largest magnitude of an input; 1
            changes nothing.
    """

    thresholds: tuple[float, ...] = (1.0, 0.85, 0.7, 0.55, 0.4)

    @property
    def exact(self) -> bool:
        """Whether the function stays: merged channels change it."""
        return False

    @torch.no_grad()
    def equal(
        self, teacher: Captured, scheme: Scheme, inputs: Sequence[Tensor], seed: int
    ) -> Captured:
        """Return the reassembled teacher."""
        del seed
        changes = Changes(teacher)
        bits_of = layer_input_bits(teacher, scheme)
        readers = {
            x: [
                user for user in x.users if queries.has_weight(user) and queries.input_of(user) is x
            ]
            for x in bits_of
        }
        rows = _inputs(teacher, {layers[0]: x for x, layers in readers.items()}, inputs)
        for x, layers in readers.items():
            weights = [changes.constant(layer, WEIGHT) for layer in layers]
            channels = self._best(
                rows[x].double(), torch.cat(weights), bits_of[x], scheme.bits.weights
            )
            if channels is None:
                continue
            parts = channels.first, channels.second, channels.shares
            columns = channels.columns.split([len(weight) for weight in weights])
            for layer, own in zip(layers, columns, strict=True):
                changes.set(layer, WEIGHT, own)
                changes.inserted[layer] = operators.REASSEMBLED, parts
        return changes.applied()

    def _best(self, x: Tensor, weight: Tensor, bits: int, weight_bits: int) -> Channels | None:
        """Return the channels of least error [M, C]; None if none are better than the old ones."""
        expected = x @ weight.mT
        least, best = torch.inf, None
        for share in self.thresholds:
            found = new_channels(x, weight, share * float(x.abs().max()))
            actual = (
                _rounded(found.columns, weight_bits)
                @ fake_quantize_tokens(
                    reassembled(x, found.first, found.second, found.shares), bits
                ).mT
            )
            error = float((actual.mT - expected).square().sum())
            if error < least:
                least, best = error, None if share == 1 else found
        return best


def _rounded(weight: Tensor, bits: int) -> Tensor:
    """Return a weight [O, C] rounded with a symmetric scale for each row."""
    peaks = weight.abs().amax(1, keepdim=True)
    return fake_quantize(weight, *symmetric_grid(-peaks, peaks, bits), bits)


def _inputs(
    teacher: Captured, layers: Mapping[fx.Node, fx.Node], inputs: Sequence[Tensor]
) -> dict[fx.Node, Tensor]:
    """Return an even sample [M, C] of what layers read, by the nodes that they read."""
    found = {}
    for visit in Walk(teacher.network).visits(*inputs):
        if visit.node in layers:
            rows = visit.inputs[0].flatten(0, -2)
            found[layers[visit.node]] = rows[:: max(1, len(rows) // _SAMPLES)]
    return found
