"""What a source of networks gives: the network, and what it says about the images it takes."""

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
        """The shape of one input and its preprocessing: what is given, else what is known.

        Raises UsageError when nobody knows the shape or it is no image's, or mean and std do not
        fit its channels.
        """
        shape = shape or self.input_shape
        if shape is None:
            raise UsageError(
                "the shape of one input must be known; this network does not say it. "
                "Give it with --input, as --input 3x32x32."
            )
        check_shape(shape)
        own = self.preprocessing
        if own is None:
            return shape, Preprocessing.of(shape[0], mean, std)
        return shape, Preprocessing.of(shape[0], mean or own.mean, std or own.std, own.resize)
