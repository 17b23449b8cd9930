"""What a network takes: a specification of each input."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gdfq.data.vocabulary import Vocabulary
from gdfq.errors import UsageError
from gdfq.files.plain_values import tagged

InputKind = Literal["image", "features", "integers", "tokens"]


IMAGES = "images"
"""The name of the one input of a network that takes images alone, in files and in `Captured`."""


@tagged("gdfq.graph.inputs.InputSpec", added={"vocabulary": None})
@dataclass(frozen=True)
class InputSpec:
    """One input of a network.

    Attributes:
        name: The name of the argument of the network's forward.
        shape: The shape of one entry, without the batch dimension. Of token ids: the length of the
            sequences that the network was captured with; it takes any length.
        dtype: The dtype that the network takes.
        vocabulary: The token ids, of a language model.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    vocabulary: Vocabulary | None = None

    @property
    def kind(self) -> InputKind:
        """ "tokens", "integers" for any others, "image" for floats [C, *size], or "features"."""
        if self.vocabulary is not None:
            return "tokens"
        if not self.dtype.is_floating_point:
            return "integers"
        return "image" if len(self.shape) >= 2 else "features"

    @classmethod
    def of(cls, name: str, example: Tensor, vocabulary: Vocabulary | None = None) -> "InputSpec":
        """Return the specification of an example input [N, *shape]."""
        return cls(name, tuple(example.shape[1:]), example.dtype, vocabulary)

    def zeros(self, count: int, device: torch.device | str = "cpu") -> Tensor:
        """Return a batch [count, *shape] of zeros."""
        return torch.zeros(count, *self.shape, dtype=self.dtype, device=device)

    def noise(self, count: int, draw: torch.Generator) -> Tensor:
        """Return a batch [count, *shape] of white noise.

        Token ids are random, other integers are 0 and boolean masks True.
        """
        if self.vocabulary is not None:
            return torch.randint(self.vocabulary.size, (count, *self.shape), generator=draw)
        if self.dtype == torch.bool:
            return self.zeros(count).logical_not()
        if not self.dtype.is_floating_point:
            return self.zeros(count)
        return torch.randn(count, *self.shape, generator=draw, dtype=self.dtype)

    def __str__(self) -> str:
        return f"{self.name}: {'x'.join(map(str, self.shape)) or 'scalar'} {self.kind}"


def image_shape(
    inputs: Sequence[InputSpec],
    *,
    needs: str = "this step needs",
    advice: str = "To quantize it, give real inputs: data=, a mapping of these names to tensors "
    "[N, ...].",
) -> tuple[int, ...]:
    """Return the shape of one image, for a network that only takes images.

    Args:
        inputs: The inputs of the network.
        needs: What needs such a network, for the user.
        advice: What to do where the network is another one.

    Raises:
        UsageError: The network takes several inputs, or integers.
    """
    if not takes_images(inputs):
        raise UsageError(
            f"{needs} a network that takes images alone (one tensor of floats); this one takes "
            f"{', '.join(map(str, inputs))}. {advice}"
        )
    return inputs[0].shape


def takes_images(inputs: Sequence[InputSpec]) -> bool:
    """Return whether the only input of a network is one tensor of floats."""
    return len(inputs) == 1 and inputs[0].dtype.is_floating_point and bool(inputs[0].shape)


def vocabulary_of(inputs: Sequence[InputSpec]) -> Vocabulary | None:
    """Return the vocabulary of a language model, or None for any other network."""
    return inputs[0].vocabulary if len(inputs) == 1 else None
