"""The card of a quantized network."""

from dataclasses import dataclass

from gdfq.data.class_names import ClassNames
from gdfq.data.preprocessing import Preprocessing
from gdfq.data.vocabulary import Vocabulary
from gdfq.files.plain_values import tagged
from gdfq.functional.grid import Bits
from gdfq.graph.inputs import InputSpec, image_shape, vocabulary_of
from gdfq.graph.outputs import Structure
from gdfq.student.scheme import Placement
from gdfq.version import __version__


@tagged(
    "Card",
    renamed={"layer_bits": "keep"},
    spellings={"relu": "t1"},
    ignored=("class_names",),
    added={"candidates": None},
)
@dataclass(frozen=True)
class Card:
    """What a user must know to use the network."""

    inputs: tuple[InputSpec, ...]
    """The network's inputs, in order."""
    classes: int | None
    """Number of classes; None for a network whose outputs are not classes."""
    outputs: Structure
    preprocessing: Preprocessing
    bits: Bits
    placement: Placement
    recipe: str
    seed: int
    layer_bits: tuple[str, ...] = ()
    gdfq_version: str = __version__
    candidates: str | None = None
    """Which images from elsewhere it was tuned on, in words; None if there were none."""
    class_names: ClassNames | None = None
    """Names of each class, which identify class folders; None if the network has none."""

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Return the shape of one image, for a network that only takes images.

        Raises:
            UsageError: The network takes several inputs, or integers.
        """
        return image_shape(self.inputs)

    @property
    def vocabulary(self) -> Vocabulary | None:
        """The token ids of a language model; None for any other network."""
        return vocabulary_of(self.inputs)
