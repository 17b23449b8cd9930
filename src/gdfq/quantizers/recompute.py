"""Tensors that the backward pass makes again instead of keeping them.

A quantized tensor is as large as what it was made from and cheap to make, yet autograd keeps both:
the one for the layer that reads it, the other for the quantizer's own gradient.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


@dataclass
class Slot:
    """Where a tensor waits that was made again, from the first that asks for it to the last."""

    tensor: Tensor | None = None

    def look(self, make: Callable[[], Tensor]) -> Tensor:
        """The tensor, for one of several readers."""
        if self.tensor is None:
            self.tensor = make()
        return self.tensor

    def take(self, make: Callable[[], Tensor]) -> Tensor:
        """The tensor, for its last reader."""
        tensor, self.tensor = self.look(make), None
        return tensor


@dataclass(frozen=True)
class _Made:
    """How a tensor was made. `make` gives the same values in the same layout each time."""

    make: Callable[[], Tensor]
    slot: Slot = field(default_factory=Slot)


@dataclass(frozen=True)
class _View:
    """A tensor in the place of which autograd keeps how it is made."""

    made: _Made
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def tensor(self) -> Tensor:
        whole = self.made.slot.look(self.made.make)
        return whole.as_strided(self.size, self.stride, self.offset)


def mark_recomputable(tensor: Tensor, make: Callable[[], Tensor]) -> Slot:
    """Let `recomputing` know how a new tensor is made; its memory, and all views, remember it."""
    made = _Made(make)
    tensor.untyped_storage().made = made  # type: ignore[attr-defined]
    return made.slot


def recomputing() -> AbstractContextManager[None]:
    """A context whose operators keep no tensor for the backward pass that can be made again."""
    return saved_tensors_hooks(_pack, _unpack)


def _pack(tensor: Tensor) -> Tensor | _View:
    made = getattr(tensor.untyped_storage(), "made", None)
    if made is None:
        return tensor
    return _View(made, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))


def _unpack(kept: Tensor | _View) -> Tensor:
    return kept.tensor() if isinstance(kept, _View) else kept
