"""What an equalizer of a language model is."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from gdfq.equalizers.structure import Structure
from gdfq.errors import GdfqError
from gdfq.graph.capture import Captured
from gdfq.student.scheme import Scheme


class Equalizer(Protocol):
    """Changes a language model before its student is built.

    An equalizer is a frozen dataclass that derives from this class and has the method `equal`;
    one that needs a residual stream derives from `StreamEqualizer`.
    """

    @property
    def exact(self) -> bool:
        """Whether the function stays, apart from the rounding of floats."""
        return True

    @property
    def folds(self) -> bool:
        """Whether weights alone change, so that the graph stays that of the model."""
        return False

    def check(self, teacher: Captured) -> None:
        """Check that a language model has a form that can be changed.

        Raises:
            UsageError: It has not.
        """
        del teacher

    @abstractmethod
    def equal(
        self, teacher: Captured, scheme: Scheme, inputs: Sequence[Tensor], seed: int
    ) -> Captured:
        """Return a teacher that computes the same.

        Args:
            teacher: A language model.
            scheme: What is quantized, to how many bits.
            inputs: Token ids [N, L] that it may look at.
            seed: Seed of its randomness.

        Raises:
            UsageError: The model has a form that it cannot change.
        """
        ...


class StreamEqualizer(Equalizer):
    """An equalizer that changes the residual stream, or what reads and writes it."""

    def check(self, teacher: Captured) -> None:
        """Check that the model has a residual stream with root-mean-square norms."""
        Structure.of(teacher.network.graph)


_MAX_DIFFERENCE = 1e-3
"""Largest difference of logits, relative to their size: float32 rounds through many layers."""


@torch.no_grad()
def check_equal(teacher: Captured, changed: Captured, inputs: Sequence[Tensor]) -> None:
    """Check that an equalizer kept the function.

    Args:
        teacher: The model as it was.
        changed: What the equalizer made of it.
        inputs: Token ids [N, L]; a few are compared.

    Raises:
        GdfqError: The outputs differ.
    """
    few = [tokens[:2] for tokens in inputs]
    expected, actual = teacher.network(*few), changed.network(*few)
    difference = float((actual - expected).norm() / expected.norm())
    if not difference <= _MAX_DIFFERENCE:
        raise GdfqError(
            "an equalizer must keep the function of the model; its logits changed by "
            f"{100 * difference:.2g} %. Report the model; without an equalizer it can be quantized."
        )
