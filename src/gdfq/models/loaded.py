"""A loaded network, and what its source says about the images it takes."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from gdfq.data.preprocessing import Preprocessing
from gdfq.errors import UsageError
from gdfq.files.untrusted import check_shape


@dataclass(frozen=True, eq=False)
class Loaded:
    """A network and its own configuration.

    input_shape: of one input, [C, H, W]; None when the source does not know it.
    preprocessing: from pixels to that input; None when the source does not know it.
    """

    module: nn.Module
    input_shape: tuple[int, ...] | None = None
    preprocessing: Preprocessing | None = None

    def input(
        self,
        shape: tuple[int, ...] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> tuple[tuple[int, ...], Preprocessing]:
        """Return the shape of one input and its preprocessing: as given, else as the network says.

        Raises UsageError if the shape is neither given nor known, or is too large, or if mean and
        std do not fit its channels.
        """
        shape = shape or self.input_shape
        if shape is None:
            raise UsageError(
                "the shape of one input must be known; this network does not tell it. "
                "Give it with --input, as --input 3x32x32."
            )
        check_shape(shape)
        own = self.preprocessing
        if own is None:
            return shape, Preprocessing.of(shape[0], mean, std)
        return shape, Preprocessing.of(shape[0], mean or own.mean, std or own.std, own.resize)
