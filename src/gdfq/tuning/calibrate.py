"""Calibration: the activation ranges of a student, from a few batches without gradients."""

from collections.abc import Iterable

import torch

from gdfq.errors import GdfqError
from gdfq.execution.context import Context
from gdfq.execution.progress import RANGES, Step, is_due
from gdfq.quantizers.base import ActivationQuantizer
from gdfq.sources.base import Batch
from gdfq.student.build import Student


@torch.no_grad()
def calibrate_(
    student: Student,
    batches: Iterable[Batch],
    *,
    steps: int,
    context: Context = Context(),
    first_step: int = 0,
) -> None:
    """Track all activation ranges over the batches, then freeze them.

    Args:
        student: A student whose ranges are not yet known, changed in place.
        batches: The batches from `first_step` on.
        steps: Batches of the calibration in all.
        context: Context of the run.
        first_step: Batches that were seen before an interruption.

    Raises:
        GdfqError: A range is not finite.
    """
    student.eval()
    for quantizer in student.activations:
        quantizer.observing = True
    for step, batch in enumerate(batches, start=first_step + 1):
        student(batch.images)
        ranges = student.ranges() if is_due(step, steps, RANGES) else {}
        context.listener(Step("calibrate", step, steps, batch.losses, ranges=ranges))
    for name, quantizer in student.named_modules():
        if isinstance(quantizer, ActivationQuantizer):
            quantizer.observing = False
            if not bool(quantizer.grid()[0].isfinite()):
                raise GdfqError(
                    f"every activation range must be finite; that of {name} is not. "
                    "Look for NaN or infinity in the images."
                )
