"""Calibration: the student sees batches and its activation ranges follow; weights stay."""

from collections.abc import Iterable

import torch

from gdfq.progress import Listener, Step
from gdfq.sources import Batch
from gdfq.student import Student


@torch.no_grad()
def calibrate_(
    student: Student, batches: Iterable[Batch], *, steps: int, listener: Listener
) -> None:
    """Track all activation ranges over the batches (`steps` of them), then freeze them."""
    student.eval()
    for quantizer in student.activations:
        quantizer.observing = True
    for step, batch in enumerate(batches, start=1):
        student(batch.images)
        listener(Step("calibrate", step, steps, batch.losses))
    for quantizer in student.activations:
        quantizer.observing = False
