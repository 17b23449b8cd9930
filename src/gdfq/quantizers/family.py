"""Families of quantizers: matching fake quantizers for weights and activations, and their needs.

A recipe names a family. A new kind of quantizer is a new value of `QuantizerFamily`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from torch import Tensor, nn

from gdfq.functional.float_grid import NumberFormat
from gdfq.functional.grid import Layout
from gdfq.graph.batch_norms import fold_batch_norms
from gdfq.graph.capture import Captured
from gdfq.quantizers.adaround import RoundedFloatWeight, RoundedWeight
from gdfq.quantizers.base import ActivationQuantizer, WeightQuantizer
from gdfq.quantizers.float_lsq import FloatRange, FloatWeight
from gdfq.quantizers.lsq import LearnedRange, LearnedWeight
from gdfq.quantizers.minmax import MinMaxWeight, MovingRange
from gdfq.quantizers.tokens import BlockWeight, TokenRounding


class MakeFloatWeight(Protocol):
    """Makes the quantizer of a weight with one of some formats."""

    def __call__(
        self,
        weight: Tensor,
        bits: int,
        layout: Layout,
        groups: int = 1,
        *,
        forms: Sequence[NumberFormat],
    ) -> WeightQuantizer:
        """See `QuantizerFamily.weight` for the arguments."""
        ...


class MakeFloatActivation(Protocol):
    """Makes the quantizer of an activation with one of some formats."""

    def __call__(self, bits: int, *, forms: Sequence[NumberFormat]) -> ActivationQuantizer:
        """See `QuantizerFamily.activation` for the arguments."""
        ...


class MakeBlockWeight(Protocol):
    """Makes the quantizer of a weight whose scales are of blocks of columns."""

    def __call__(
        self, weight: Tensor, bits: int, layout: Layout, groups: int, *, block: int
    ) -> WeightQuantizer:
        """See `QuantizerFamily.weight` and `BlockWeight` for the arguments."""
        ...


@dataclass(frozen=True)
class QuantizerFamily:
    """The quantizers of a student, and what they require of its teacher.

    Attributes:
        name: Identifies the family in configurations; never change it.
        weight: Makes the quantizer of a weight from the weight, the bits, the layout of its
            channels and its groups.
        activation: Makes the quantizer of an activation from the bits.
        folds: Batch norms are folded into the layers before the student is built, so their
            statistics are fixed.
        equalizes: Channels are equalized by the first images (`gdfq.student.equalization`).
        rescales: Weight quantizers have `rescale_`, which moment matching needs.
        learns_rounding: The rounding of weights is learned, which only some tunings do.
        symmetric_weight: Makes the quantizer of a weight whose zero points are 0, from the same
            arguments as `weight`; None if the family has none.
        float_weight: Makes the quantizer of a weight with a floating-point grid; None if the
            family has none.
        float_activation: Makes that of an activation; None if the family has none.
        tokens: Makes what rounds each token of a language model from the bits; None if the family
            is not for language models.
        blocks: Makes the quantizer of a weight with scales for blocks of at most so many columns.
    """

    name: str
    weight: Callable[[Tensor, int, Layout, int], WeightQuantizer]
    activation: Callable[[int], ActivationQuantizer]
    folds: bool = True
    equalizes: bool = False
    rescales: bool = False
    learns_rounding: bool = False
    symmetric_weight: Callable[[Tensor, int, Layout, int], WeightQuantizer] | None = None
    float_weight: MakeFloatWeight | None = None
    float_activation: MakeFloatActivation | None = None
    tokens: Callable[[int], nn.Module] | None = None
    blocks: MakeBlockWeight | None = None

    def prepared(self, teacher: Captured) -> Captured:
        """Return the teacher in the form that students of this family start from."""
        return fold_batch_norms(teacher) if self.folds else teacher

    def plain_value(self) -> str:
        """Return the name, which stands for the family in configurations."""
        return self.name


def _min_max_weight(
    weight: Tensor, bits: int, layout: Layout, groups: int, *, symmetric: bool = False
) -> WeightQuantizer:
    del weight  # the grid is that of the current weight
    return MinMaxWeight(bits, layout, groups, symmetric=symmetric)


MINMAX = QuantizerFamily(
    "min-max",
    _min_max_weight,
    MovingRange,
    folds=False,
    symmetric_weight=partial(_min_max_weight, symmetric=True),
)
"""GDFQ's: grids over the minimum and maximum of the weights and of the batches."""
LSQ = QuantizerFamily(
    "learned",
    LearnedWeight,
    LearnedRange,
    equalizes=True,
    rescales=True,
    symmetric_weight=partial(LearnedWeight, symmetric=True),
    float_weight=FloatWeight,
    float_activation=FloatRange,
)
"""Grids that are trained with the student."""
ADAROUND = QuantizerFamily(
    "rounded",
    RoundedWeight,
    LearnedRange,
    learns_rounding=True,
    symmetric_weight=partial(RoundedWeight, symmetric=True),
    float_weight=RoundedFloatWeight,
    float_activation=FloatRange,
)
"""Learned rounding of weights, and trained grids."""
TOKENS = QuantizerFamily(
    "learned-tokens",
    partial(LearnedWeight, symmetric=True),
    LearnedRange,
    symmetric_weight=partial(LearnedWeight, symmetric=True),
    tokens=TokenRounding,
    blocks=BlockWeight,
)
"""Of language models: trained symmetric grids of weights, and a scale for each token."""
