"""Collapse: a generator that gives one image, or images of one class, whatever it is asked for."""

import torch
from torch import Tensor

from gdfq.errors import GdfqError

_ALIKE = 1e-3
"""Share of the images' variance that lies between images; noise and pictures have nearly all."""
_ONE_CLASS = 0.99
"""Share of a batch that the teacher sees in one class, though many were asked for."""
_EVERY, _GRACE = 50, 200
"""Steps between two looks, and before the first: an untrained generator makes one class as well."""
_LOOKS = 3
"""Looks in a row that must find the same."""


class CollapsedError(GdfqError):
    """A generator whose images are no use."""


def symptom_of(images: Tensor, logits: Tensor | None, labels: Tensor) -> str | None:
    """What says that a batch is of a collapsed generator, or None.

    images [N, C, *size]; logits [N, C] of the teacher, or None where classes mean nothing; labels
    [N] that were asked for. Batches of fewer than 8 images say nothing.
    """
    if len(images) < 8:
        return None
    between = float(images.var(0, correction=0).mean())
    whole = float(images.transpose(0, 1).flatten(1).var(1, correction=0).mean())
    if between < _ALIKE * whole or whole == 0:
        return f"all images alike (variance {between:.2g} between them, {whole:.2g} in all)"
    if logits is not None and len(labels.unique()) > 1:
        answers = logits.argmax(1)
        most = int(answers.bincount().argmax())
        share = float((answers == most).double().mean())
        if share >= _ONE_CLASS:
            return f"{100 * share:.0f} % of the images in class {most}, whatever was asked for"
    return None


class CollapseWatch:
    """Looks at a generator's batches now and then.

    Raises CollapsedError when several looks in a row find a symptom.
    """

    def __init__(self) -> None:
        self._found = 0

    @torch.no_grad()
    def look(self, step: int, images: Tensor, logits: Tensor | None, labels: Tensor) -> None:
        if step < _GRACE or step % _EVERY:
            return
        symptom = symptom_of(images, logits, labels)
        self._found = 0 if symptom is None else self._found + 1
        if self._found >= _LOOKS:
            raise CollapsedError(
                f"the generator must make different images; it has collapsed: at step {step}, and "
                f"in the {_LOOKS - 1} looks before it, {symptom}."
            )

    def state_dict(self) -> dict[str, int]:
        return {"found": self._found}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._found = state["found"]
