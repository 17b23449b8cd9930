"""What a network takes: a specification of each input."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

InputKind = Literal["image", "features", "integers"]


@dataclass(frozen=True)
class InputSpec:
    """One input of a network.

    Attributes:
        name: The name of the argument of the network's forward.
        shape: The shape of one entry, without the batch dimension.
        dtype: The dtype that the network takes.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    @property
    def kind(self) -> InputKind:
        """ "integers" for any integer dtype, "image" for floats [C, *size], else "features"."""
        if not self.dtype.is_floating_point:
            return "integers"
        return "image" if len(self.shape) >= 2 else "features"

    @classmethod
    def of(cls, name: str, example: Tensor) -> "InputSpec":
        """The specification of an example input [N, *shape]."""
        return cls(name, tuple(example.shape[1:]), example.dtype)

    def __str__(self) -> str:
        return f"{self.name}: {'x'.join(map(str, self.shape)) or 'scalar'} {self.kind}"
