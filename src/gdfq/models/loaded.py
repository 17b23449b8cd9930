"""A loaded network, and what its source knows about the inputs it takes."""

from dataclasses import dataclass

from torch import Tensor, nn

from gdfq.data.class_names import ClassNames, class_names
from gdfq.data.preprocessing import PerChannel, Preprocessing
from gdfq.data.tokens import Decode, Encode
from gdfq.data.vocabulary import Vocabulary
from gdfq.diffusion.scheduler import SchedulerConfig
from gdfq.errors import UsageError
from gdfq.files.untrusted import check_shape


@dataclass(frozen=True, eq=False)
class Loaded:
    """A network and its own configuration.

    Attributes:
        module: The network.
        input_shape: Shape of one input, [C, H, W]; None if the source does not know it.
        preprocessing: From pixels to that input; None if the source does not know it.
        class_names: Names of the outputs; None if the source does not know them.
        notes: Which parts of a weights file were loaded, for the user.
        scheduler: The scheduler of a diffusion model whose denoiser the network is.
        conditions: The labels of classes [M] that this denoiser takes.
        vocabulary: The token ids of a language model; None for any other network.
        encode: Its tokenizer, where it comes with one.
        decode: The text of token ids, where it comes with a tokenizer.
    """

    module: nn.Module
    input_shape: tuple[int, ...] | None = None
    preprocessing: Preprocessing | None = None
    class_names: ClassNames | None = None
    notes: tuple[str, ...] = ()
    scheduler: SchedulerConfig | None = None
    conditions: Tensor | None = None
    vocabulary: Vocabulary | None = None
    encode: Encode | None = None
    decode: Decode | None = None

    def input(
        self,
        shape: tuple[int, ...] | None = None,
        mean: PerChannel | None = None,
        std: PerChannel | None = None,
    ) -> tuple[tuple[int, ...], Preprocessing]:
        """Return the shape of one input and its preprocessing; arguments override what is known.

        Args:
            shape: Shape of one input, [C, H, W].
            mean: Mean of each channel, for pixels in 0..1.
            std: Standard deviation of each channel, for pixels in 0..1.

        Raises:
            UsageError: The shape is neither given nor known, or is too large, or mean and std do
                not fit its channels.
        """
        shape = shape or self.input_shape
        if shape is None:
            raise UsageError(
                "the shape of one input must be known; this network does not define it. "
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
    """Return the class names in a module of transformers (`id2label`) or Ultralytics (`names`)."""
    values = getattr(getattr(module, "config", None), "id2label", None)
    return class_names(getattr(module, "names", None) if values is None else values)
