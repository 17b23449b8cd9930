"""Distillation: the whole student learns the teacher's outputs and block features, and labels."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from gdfq.diffusion.weights import MinSnr
from gdfq.execution.budget import MemoryBudget
from gdfq.execution.context import Context
from gdfq.execution.distributed import ALONE, Group
from gdfq.execution.guards import check_finite
from gdfq.execution.precision import to_float32
from gdfq.execution.progress import RANGE_REPORTS, Step, is_due
from gdfq.execution.replay import Replayed
from gdfq.files.plain_values import tagged
from gdfq.functional.losses import distillation_loss, feature_loss
from gdfq.graph import queries
from gdfq.graph.batch_norms import fold_batch_norms
from gdfq.graph.blocks import block_ends
from gdfq.graph.blocks import with_features as features_of
from gdfq.graph.capture import Captured
from gdfq.graph.memory import training_bytes
from gdfq.graph.outputs import in_order
from gdfq.optim import OptimizerConfig, Schedule, StepDecay, set_rate_
from gdfq.sources.base import Batch
from gdfq.sources.stream import Feed
from gdfq.student.build import Student
from gdfq.tuning.base import Tuning

Predictions = tuple[Any, Sequence[Tensor]]
"""Outputs of student or teacher (logits [N, C] of a classifier), and the features of each block."""


@tagged("Distillation", added={"time_weights": None})
@dataclass(frozen=True)
class Distillation(Tuning):
    """L(Q) = cross_entropy · CE(Q(x̂), y) + distillation · T² KL(M(x̂) ‖ Q(x̂)) + features · L_F.

    γ of the paper is `distillation`; L_F is `feature_loss` over the ends of the blocks. A network
    whose outputs are not classes has no CE, and `feature_loss` over its outputs instead of the KL.

    Attributes:
        optimizer: Optimizer of all parameters of the student.
        schedule: Of the learning rate.
        cross_entropy: Weight of the cross-entropy with the labels.
        distillation: Weight of the distillation loss.
        temperature: T.
        reduction: Of the KL: "element" as the published numbers were made, "batch" the standard
            (see `distillation_loss`).
        features: Weight of the feature loss.
        difficulty: The cross-entropy leaves out images whose difficulty 1 − p_y, by the teacher, is
            above this (SynQ, arXiv 2603.18423); 1 leaves out none.
        fixed_statistics: Whether the statistics of batch norms stay as they are.
        time_weights: Of a denoiser: weights of the errors by time step; None weighs all alike.
    """

    optimizer: OptimizerConfig
    schedule: Schedule = StepDecay()  # noqa: RUF009 (frozen)
    cross_entropy: float = 1.0
    distillation: float = 1.0
    temperature: float = 20.0
    reduction: Literal["element", "batch"] = "element"
    features: float = 0.0
    difficulty: float = 1.0
    fixed_statistics: bool = True
    time_weights: MinSnr | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the parts that are registered with the checkpointer."""
        return ("optimizer",)

    @property
    def learns_labels(self) -> bool:
        """Whether it learns labels: the cross-entropy does."""
        return bool(self.cross_entropy)

    @property
    def needs_folded_batch_norms(self) -> bool:
        """Whether batch norms must be folded: block features are matched where they are."""
        return bool(self.features)

    def weighted_by_time(self, weights: MinSnr) -> "Distillation":
        """Return this tuning for a denoiser, with weights of the errors by time step."""
        return replace(self, time_weights=weights)

    def run_(
        self,
        student: Student,
        teacher: Captured,
        feed: Feed,
        *,
        first_step: int,
        total_steps: int,
        batch: int,
        context: Context = Context(),
    ) -> None:
        """Update the student once for each batch that is left of the run (see `tune_`)."""
        del first_step, batch
        tune_(
            student,
            teacher,
            feed.until(total_steps),
            self,
            first_step=feed.taken,
            total_steps=total_steps,
            context=context,
        )

    def losses(
        self,
        student: Predictions,
        teacher: Predictions,
        labels: Tensor | None,
        group: Group = ALONE,
        weights: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return L(Q) under "student", and those of its parts that have a weight.

        Args:
            student: Predictions of the student.
            teacher: Predictions of the teacher.
            labels: [N], or None for a network whose outputs are not classes; of a language model
                the next tokens [N, L - 1].
            group: The mean of the losses of its processes is that of the whole batch.
            weights: Of the squared errors of each input in the feature losses, [N].

        Returns:
            Scalars by name.
        """
        student_outputs, student_features = student
        teacher_outputs, teacher_features = teacher
        if labels is not None and labels.ndim == 2:  # of a language model: each token is an entry
            student_outputs, teacher_outputs = (
                logits[:, :-1].flatten(0, 1) for logits in (student_outputs, teacher_outputs)
            )
            labels = labels.flatten()
        parts: dict[str, tuple[float, Tensor]] = {}
        if self.cross_entropy and labels is not None:
            errors = F.cross_entropy(to_float32(student_outputs), labels, reduction="none")
            p = to_float32(teacher_outputs).softmax(1).gather(1, labels[:, None]).squeeze(1)
            error = torch.where(1 - p <= self.difficulty, errors, 0.0).mean()
            parts["ce"] = self.cross_entropy, error
        if self.distillation and labels is not None:
            kl = distillation_loss(
                student_outputs, teacher_outputs, self.temperature, self.reduction
            )
            parts["kd"] = self.distillation, kl
        elif self.distillation:
            outputs = (in_order(student_outputs), in_order(teacher_outputs))
            observed, target = (_weighted(values, weights) for values in outputs)
            parts["outputs"] = self.distillation, feature_loss(observed, target, group)
        if self.features and teacher_features:  # a network of one block has none
            of_blocks = (student_features, teacher_features)
            observed, target = (_weighted(values, weights) for values in of_blocks)
            parts["features"] = self.features, feature_loss(observed, target, group)
        total = sum((weight * loss for weight, loss in parts.values()), torch.zeros(()))
        return {"student": total, **{name: loss for name, (_, loss) in parts.items()}}


def tune_(
    student: Student,
    teacher: Captured,
    batches: Iterable[Batch],
    config: Distillation,
    *,
    first_step: int,
    total_steps: int,
    context: Context = Context(),
) -> None:
    """Update the student once for each batch; each process of a group takes a shard of it.

    On a CPU large images pass in parts, whose losses are averaged. The errors of features are then
    relative to the features of each part. Parts that do not fit into the memory
    budget are made smaller, which needs a budget far below the default.

    Args:
        student: A student with known activation ranges, trained in place.
        teacher: The network that it learns from.
        batches: The batches that are left of the run.
        config: Losses, optimizer and schedule.
        first_step: Step of the first batch; the schedule counts from the first step of the run.
        total_steps: Steps of the run.
        context: Context of the run.

    Raises:
        GdfqError: The loss is not finite.
    """
    group = context.group
    student.train()  # only batch norms without fixed statistics behave differently
    optimizer = context.checkpointer.register("optimizer", config.optimizer.build(student))
    gradients = _Gradients(student, teacher, config, context)
    # Statistics that follow the batch need it whole, each process the same.
    own = group if config.fixed_statistics else ALONE
    for step, whole in enumerate(batches, start=first_step):
        batch = whole.shard(own)
        rate = config.schedule.factor(step, total_steps)
        set_rate_(optimizer, rate)
        optimizer.zero_grad()
        losses = gradients.add_(batch)
        group.average_(parameter.grad for parameter in student.parameters())
        group.average_(losses.values())
        check_finite(
            losses,
            whose="student",
            when=f"step {step}",
            advice="Lower the learning rate or use more bits.",
        )
        optimizer.step()
        ranges = student.ranges() if is_due(step + 1, total_steps, RANGE_REPORTS) else {}
        context.listener(
            Step("tune", step + 1, total_steps, {**batch.losses, **losses}, rate, ranges)
        )
    gradients.forget()
    student.eval()


class _Losses:
    """The losses of a part of a batch: a function of tensors alone, as `Replayed` needs it."""

    def __init__(
        self, student: Student, teacher: Captured, config: Distillation, context: Context
    ) -> None:
        self._config, self._context, self._device = config, context, teacher.device
        self._student, self._teacher = _predictors(
            student, teacher, with_features=bool(config.features)
        )

    def __call__(
        self, labels: Tensor | None, teacher_logits: Tensor | None, *inputs: Tensor
    ) -> dict[str, Tensor]:
        part = Batch(inputs, labels, teacher_logits)
        with self._context.autocast(self._device):
            expected = self._teacher(part)
            actual = self._student(part)
        by_time = self._config.time_weights
        weights = None if by_time is None else by_time.weights(inputs[1])
        losses = self._config.losses(actual, expected, labels, self._context.group, weights)
        return {name: x if name == "student" else x.detach() for name, x in losses.items()}


class _Gradients:
    """The gradients of a student for batches, each of which passes in as many parts as it needs."""

    def __init__(
        self, student: Student, teacher: Captured, config: Distillation, context: Context
    ) -> None:
        self._losses = _Losses(student, teacher, config, context)
        in_parts = config.fixed_statistics  # others need the batch whole
        self._images_at_once = _images_at_once(teacher, context.memory) if in_parts else None
        # Gradients of parts are summed, and processes of a group exchange numbers.
        self._is_repeatable = in_parts and context.group.size == 1
        self._replayed = Replayed(self._losses, student.parameters())

    def add_(self, batch: Batch) -> dict[str, Tensor]:
        """Add the gradients of a batch, and return its losses: the means over its images."""
        parts = batch.split(self._images_at_once or len(batch))
        replays = self._is_repeatable and len(parts) == 1
        evaluated = self._replayed if replays else self._losses
        losses: dict[str, Tensor] = {}
        for part in parts:
            share = len(part) / len(batch)
            with torch.enable_grad():
                of_part = evaluated(part.labels, part.teacher_logits, *part.inputs)
                (share * of_part["student"]).backward()
            for name, loss in of_part.items():
                losses[name] = share * loss.detach() + losses.get(name, 0)
        return losses

    def forget(self) -> None:
        """Free the memory of recorded steps."""
        self._replayed.forget()


def _weighted(values: Sequence[Tensor], weights: Tensor | None) -> Sequence[Tensor]:
    """Return tensors times √w, so that the squared errors of an input have its weight w.

    Args:
        values: [N k, ...] each, with k rows for each input.
        weights: w, [N]; None for 1.
    """
    if weights is None:
        return values
    rows = [weights.sqrt().repeat_interleave(len(x) // len(weights)) for x in values]
    return [x * row.view(-1, *(1,) * (x.ndim - 1)) for x, row in zip(values, rows, strict=True)]


_MAX_FEATURE_BYTES = 2**24
"""Maximum size of a feature map in bytes: larger ones do not fit the cache."""


_NETWORK_COUNT = 2
"""Whose activations are held: the student saves its own, rounded and not, beside the teacher's."""


def _images_at_once(teacher: Captured, memory: MemoryBudget) -> int:
    """Return how many images pass the networks together; gradients accumulate over the parts."""
    fits = memory.images(_NETWORK_COUNT * training_bytes(teacher.network.graph), teacher.device)
    if teacher.device.type != "cpu":
        return fits
    activations = filter(queries.is_activation, teacher.network.graph.nodes)
    largest = max(map(queries.elements_per_image, activations))
    return min(fits, max(1, _MAX_FEATURE_BYTES // (4 * largest)))


def _predictors(
    student: Student, teacher: Captured, *, with_features: bool
) -> tuple[Callable[[Batch], Predictions], Callable[[Batch], Predictions]]:
    """Return functions that predict as student and teacher do; the latter without gradients."""
    if with_features:
        network = fold_batch_norms(teacher).network  # batch norms cost time and change nothing
        ends = block_ends(network.graph)
        student_predicts = student.with_features([node.name for node in ends])
        teacher_predicts = features_of(network, ends)
        return lambda batch: student_predicts(*batch.inputs), torch.no_grad()(
            lambda batch: teacher_predicts(*batch.inputs)
        )

    @torch.no_grad()
    def logits(batch: Batch) -> Predictions:
        known = batch.teacher_logits
        return teacher.network(*batch.inputs) if known is None else known, ()

    return lambda batch: (student(*batch.inputs), ()), logits
