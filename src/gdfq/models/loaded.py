"""A loaded network, and what its source says about the images it takes."""

from dataclasses import dataclass

from torch import nn

from gdfq.data.class_names import ClassNames, class_names
from gdfq.data.preprocessing import PerChannel, Preprocessing
from gdfq.errors import UsageError
from gdfq.files.untrusted import check_shape


@dataclass(frozen=True, eq=False)
class Loaded:
    """A network and its own configuration.

    input_shape: of one input, [C, H, W]; None when the source does not know it.
    preprocessing: from pixels to that input; None when the source does not know it.
    class_names: what its outputs stand for; None when the source does not know it.
    notes: what was taken of a weights file, for the user.
    """

    module: nn.Module
    input_shape: tuple[int, ...] | None = None
    preprocessing: Preprocessing | None = None
    class_names: ClassNames | None = None
    notes: tuple[str, ...] = ()

    def input(
        self,
        shape: tuple[int, ...] | None = None,
        mean: PerChannel | None = None,
        std: PerChannel | None = None,
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
        mean = own.mean if mean is None else mean
        std = own.std if std is None else std
        return shape, Preprocessing.of(shape[0], mean, std, own.resize)


def names_of(module: nn.Module) -> ClassNames | None:
    """Return the class names that a module holds as transformers or Ultralytics have them."""
    values = getattr(getattr(module, "config", None), "id2label", None)
    return class_names(getattr(module, "names", None) if values is None else values)
