"""Collapse: a generator that makes one image, or images of one class, for all labels."""

import torch
from torch import Tensor

from gdfq.errors import GdfqError

_MIN_VARIANCE_SHARE = 1e-3
"""Share of the variance that lies between images: nearly all for noise and pictures."""
_MAX_CLASS_SHARE = 0.99
"""Share of a batch that the teacher predicts to be of one class, though the labels are many."""
_STEPS_BETWEEN_CHECKS, _FIRST_CHECK = 50, 200
"""An untrained generator makes one class as well, so the first check is late."""
_CHECKS = 3
"""Checks in a row that must find a symptom."""


class CollapsedError(GdfqError):
    """A generator has collapsed: its images cannot be used."""


def symptom_of(images: Tensor, logits: Tensor | None, labels: Tensor) -> str | None:
    """Return the symptom of collapse that a batch shows, or None.

    Args:
        images: [N, C, *size]. Batches of fewer than 8 images show no symptom.
        logits: Of the teacher, [N, C], or None where classes do not matter.
        labels: That the generator was given, [N].
    """
    if len(images) < 8:
        return None
    between = float(images.var(0, correction=0).mean())
    whole = float(images.transpose(0, 1).flatten(1).var(1, correction=0).mean())
    if between < _MIN_VARIANCE_SHARE * whole or whole == 0:
        return f"all images alike (variance {between:.2g} between them, {whole:.2g} in all)"
    if logits is not None and len(labels.unique()) > 1:
        predicted = logits.argmax(1)
        most = int(predicted.bincount().argmax())
        share = float((predicted == most).double().mean())
        if share >= _MAX_CLASS_SHARE:
            return f"{100 * share:.0f} % of the images in class {most}, whatever their labels"
    return None


class CollapseWatch:
    """Checks the batches of a generator from time to time."""

    def __init__(self) -> None:
        self._found = 0

    @torch.no_grad()
    def check(self, step: int, images: Tensor, logits: Tensor | None, labels: Tensor) -> None:
        """Check a batch if it is time.

        Args:
            step: Step of the batch.
            images: [N, C, *size].
            logits: Of the teacher, [N, C], or None where classes do not matter.
            labels: That the generator was given, [N].

        Raises:
            CollapsedError: Several checks in a row found a symptom.
        """
        if step < _FIRST_CHECK or step % _STEPS_BETWEEN_CHECKS:
            return
        symptom = symptom_of(images, logits, labels)
        self._found = 0 if symptom is None else self._found + 1
        if self._found >= _CHECKS:
            raise CollapsedError(
                f"the generator must make different images; it has collapsed: at step {step}, and "
                f"in the {_CHECKS - 1} checks before it, {symptom}."
            )

    def state_dict(self) -> dict[str, int]:
        return {"found": self._found}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._found = state["found"]
