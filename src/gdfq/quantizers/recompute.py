"""Recomputes quantized activations in the backward pass instead of saving them.

A quantized tensor is as large as its input and cheap to compute, yet autograd saves both: the one
for the layer that reads it, the other for the gradient of the quantizer.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


@dataclass
class Slot:
    """Holds a recomputed tensor from its first reader to its last."""

    tensor: Tensor | None = None

    def get(self, make: Callable[[], Tensor]) -> Tensor:
        """Return the tensor to one of several readers."""
        if self.tensor is None:
            self.tensor = make()
        return self.tensor

    def pop(self, make: Callable[[], Tensor]) -> Tensor:
        """Return the tensor to its last reader."""
        tensor, self.tensor = self.get(make), None
        return tensor


@dataclass(frozen=True)
class _Recipe:
    """How to compute a tensor: `make` returns the same values in the same layout each time."""

    make: Callable[[], Tensor]
    slot: Slot = field(default_factory=Slot)


@dataclass(frozen=True)
class _View:
    """What autograd saves instead of a tensor that can be recomputed."""

    made: _Recipe
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def tensor(self) -> Tensor:
        whole = self.made.slot.get(self.made.make)
        return whole.as_strided(self.size, self.stride, self.offset)


def mark_recomputable(tensor: Tensor, make: Callable[[], Tensor]) -> Slot:
    """Tell `recomputing` how to compute a new tensor again; this holds for all its views.

    Returns:
        The slot that holds the recomputed tensor.
    """
    made = _Recipe(make)
    tensor.untyped_storage().made = made  # type: ignore[attr-defined]
    return made.slot


def recomputing() -> AbstractContextManager[None]:
    """Return a context in which operators save no tensor that can be recomputed."""
    return saved_tensors_hooks(_pack, _unpack)


def _pack(tensor: Tensor) -> Tensor | _View:
    made = getattr(tensor.untyped_storage(), "made", None)
    if made is None:
        return tensor
    return _View(made, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))


def _unpack(kept: Tensor | _View) -> Tensor:
    return kept.tensor() if isinstance(kept, _View) else kept
