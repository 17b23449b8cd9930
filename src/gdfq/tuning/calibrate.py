"""Calibration: the student sees batches and its activation ranges follow; weights stay."""

from collections.abc import Iterable

import torch

from gdfq.errors import GdfqError
from gdfq.progress import Listener, Step
from gdfq.quantizers import ActivationQuantizer
from gdfq.sources import Batch
from gdfq.student import Student


@torch.no_grad()
def calibrate_(
    student: Student, batches: Iterable[Batch], *, steps: int, listener: Listener
) -> None:
    """Track all activation ranges over the batches (`steps` of them), then freeze them.

    Raises GdfqError when a range is not finite.
    """
    student.eval()
    for quantizer in student.activations:
        quantizer.observing = True
    for step, batch in enumerate(batches, start=1):
        student(batch.images)
        listener(Step("calibrate", step, steps, batch.losses))
    for name, quantizer in student.named_modules():
        if isinstance(quantizer, ActivationQuantizer):
            quantizer.observing = False
            if not bool(quantizer.grid()[0].isfinite()):
                raise GdfqError(
                    f"every activation range must be finite; that of {name} is not. "
                    "Look for NaN or infinity in the images."
                )
