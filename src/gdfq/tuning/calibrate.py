"""Calibration: the activation ranges of a student, from a few batches without gradients."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from gdfq.errors import GdfqError
from gdfq.execution.context import Context
from gdfq.execution.precision import to_float32
from gdfq.execution.progress import RANGE_REPORTS, Step, is_due
from gdfq.graph.memory import part_images
from gdfq.graph.walk import PartsInterpreter
from gdfq.quantizers.base import ActivationQuantizer
from gdfq.sources.base import Batch, split_inputs
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

    A batch that does not fit into the memory budget passes in parts, layer by layer: the ranges are
    the same.

    Args:
        student: A student whose ranges are not yet known, changed in place.
        batches: The batches from `first_step` on.
        steps: Total number of batches of the calibration.
        context: Context of the run.
        first_step: Number of batches processed before an interruption.

    Raises:
        GdfqError: A range is not finite.
    """
    student.eval()
    graph, device = student.network.graph, next(student.parameters()).device
    for quantizer in student.activations:
        quantizer.observing = True
    for step, batch in enumerate(batches, start=first_step + 1):
        at_once = part_images(graph, len(batch), context.memory, device)
        _observe_(student, split_inputs(batch.inputs, at_once))
        ranges = student.ranges() if is_due(step, steps, RANGE_REPORTS) else {}
        context.listener(Step("calibrate", step, steps, batch.losses, ranges=ranges))
    for name, quantizer in student.named_modules():
        if isinstance(quantizer, ActivationQuantizer):
            quantizer.observing = False
            if not bool(quantizer.grid()[0].isfinite()):
                raise GdfqError(
                    f"every activation range must be finite; that of {name} is not. "
                    "Look for NaN or infinity in the images."
                )


def _observe_(student: Student, parts: Sequence[tuple[Tensor, ...]]) -> None:
    """Pass one batch, divided into parts, through a student whose quantizers observe."""
    if len(parts) == 1:
        student(*parts[0])
        return
    _ObservedInParts(student.network).run_parts(parts)
    for quantizer in student.activations:
        quantizer.observing = True


class _ObservedInParts(PartsInterpreter):
    """Lets each quantizer observe the whole batch before any part passes it."""

    def before(self, node: fx.Node, envs: Sequence[dict[fx.Node, Any]]) -> None:
        if isinstance(quantizer := self.submodules.get(str(node.target)), ActivationQuantizer):
            (source,) = node.all_input_nodes
            quantizer.observe_(*(to_float32(env[source]) for env in envs))
            quantizer.observing = False
