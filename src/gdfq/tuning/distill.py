"""Tuning as published: cross-entropy and distillation on the stream's batches."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from gdfq.errors import GdfqError
from gdfq.losses import distillation_loss
from gdfq.progress import Listener, Step
from gdfq.schedules import SgdConfig, StepDecay
from gdfq.sources import Batch
from gdfq.student import Student


@dataclass(frozen=True)
class Distillation:
    """L(Q) = cross_entropy · CE(Q(x̂), y) + distillation · T² KL(M(x̂) ‖ Q(x̂))   (γ = distillation).

    `reduction` of the KL: "element" as the published numbers were made, "batch" the standard.
    """

    optimizer: SgdConfig
    decay: StepDecay = StepDecay()  # noqa: RUF009 (frozen)
    cross_entropy: float = 1.0
    distillation: float = 1.0
    temperature: float = 20.0
    reduction: Literal["element", "batch"] = "element"
    fixed_statistics: bool = True

    def losses(self, student_logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """L(Q) under "student", and those of its parts that have a weight."""
        parts: dict[str, Tensor] = {}
        total = student_logits.new_zeros(())
        if self.cross_entropy:
            parts["ce"] = F.cross_entropy(student_logits, batch.labels)
            total = total + self.cross_entropy * parts["ce"]
        if self.distillation:
            parts["kd"] = distillation_loss(
                student_logits, batch.teacher_logits, self.temperature, self.reduction
            )
            total = total + self.distillation * parts["kd"]
        return {"student": total, **parts}


def tune_(
    student: Student,
    batches: Iterable[Batch],
    config: Distillation,
    *,
    first_step: int,
    total_steps: int,
    listener: Listener,
) -> None:
    """One update of the student for each batch.

    The learning rate's schedule counts from the run's first step, so a tuning that begins after
    a warm-up passes `first_step` and the run's `total_steps`.

    Raises GdfqError when the loss is not finite.
    """
    student.train()  # only batch norms without fixed statistics behave differently
    optimizer = config.optimizer.build(student.parameters())
    for step, batch in enumerate(batches, start=first_step):
        config.decay.apply_(optimizer, config.optimizer.lr, step, total_steps)
        with torch.enable_grad():
            losses = config.losses(student(batch.images), batch)
            optimizer.zero_grad()
            losses["student"].backward()
        value = losses["student"].item()
        if not math.isfinite(value):
            raise GdfqError(
                f"the student's loss must stay finite; it is {value} at step {step}. "
                "Lower the learning rate or use more bits."
            )
        optimizer.step()
        logged = {**batch.losses, **{k: v.detach() for k, v in losses.items()}}
        listener(Step("tune", step + 1, total_steps, logged))
    student.eval()
