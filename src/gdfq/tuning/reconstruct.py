"""Reconstruction: block after block, each trained to give the teacher's output.

BRECQ (arXiv 2102.05426) with the mixing of QDrop (arXiv 2203.05740): a block sees inputs as its
finished predecessors make them, some of their values replaced by the teacher's own.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from gdfq.errors import UsageError
from gdfq.execution.context import Context
from gdfq.execution.guards import stay_finite
from gdfq.execution.progress import Step
from gdfq.execution.seeding import stream as random_stream
from gdfq.files.plain_values import tagged
from gdfq.graph.batch_norms import fold_batch_norms
from gdfq.graph.blocks import block_ends, blocks
from gdfq.graph.capture import Captured
from gdfq.optim import Cosine, OptimizerConfig, Schedule, set_rate_
from gdfq.quantizers.base import ActivationQuantizer, QDrop, WeightQuantizer
from gdfq.sources.base import Batch
from gdfq.sources.stream import Feed
from gdfq.student.build import Student
from gdfq.tuning.base import Tuning


@tagged("Reconstruction")
@dataclass(frozen=True)
class Reconstruction(Tuning):
    """Each block takes all steps on E‖Q_b(x) − M_b(x)‖², summed over channels.

    The stream's first `images` images are held in memory as each block's features, of which
    every step draws `batch`. A share `drop` of each block input's values is the teacher's, and of
    each activation stays unquantized. Learned rounding is driven to a decision by
    `rounding` · Σ 1 − |2h − 1|^β, β falling from 20 to 2 after a fifth of the updates.
    """

    optimizer: OptimizerConfig
    images: int
    batch: int = 32
    drop: float = 0.5
    rounding: float = 0.01
    schedule: Schedule = Cosine()  # noqa: RUF009 (frozen)

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the parts that are registered with the checkpointer."""
        return ("reconstruction",)

    @property
    def holds_batches(self) -> bool:
        """Whether the batches that calibrated are held: they are the first to reconstruct on."""
        return True

    @property
    def learns_rounding(self) -> bool:
        """Whether the rounding of weights is learned."""
        return True

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
        """Reconstruct each block in `total_steps` − `first_step` updates (see `reconstruct_`)."""
        reconstruct_(
            student,
            teacher,
            feed.hold(-(-self.images // batch)),
            self,
            updates=total_steps - first_step,
            context=context,
        )

    def seconds(
        self,
        student: Student,
        teacher: Captured,
        batch: Batch,
        *,
        first_step: int,
        total_steps: int,
        clock: Callable[[], float],
    ) -> float:
        """Return how long all updates would take: of each block the second, times their number."""
        times: list[float] = []
        context = Context(listener=lambda _: times.append(clock()))
        reconstruct_(student, teacher, [batch], self, updates=2, context=context)
        # What precedes a block's first update is done once.
        seconds = sum(b - a for a, b in zip(times[::2], times[1::2], strict=True))
        return (total_steps - first_step) * seconds


def reconstruct_(
    student: Student,
    teacher: Captured,
    batches: Iterable[Batch],
    config: Reconstruction,
    *,
    updates: int,
    context: Context = Context(),
) -> None:
    """Reconstruct all blocks on the images of the batches, each in so many updates.

    What two blocks share is trained in the first. Raises UsageError when a block's output does
    not have images as its first dimension, GdfqError when a loss is not finite.
    """
    network = fold_batch_norms(teacher).network
    ends = block_ends(network.graph)
    student_blocks = blocks(student.network, student.named([end.name for end in ends]))
    seen = wanted = torch.cat([batch.images for batch in batches])
    total = updates * len(student_blocks)
    place = context.checkpointer.register(
        "reconstruction", _Place(random_stream(context.seed, "reconstruct.draw"))
    )
    finished: set[nn.Parameter] = set()
    for index, (block, goal) in enumerate(zip(student_blocks, blocks(network, ends), strict=True)):
        block.requires_grad_(True)
        for parameter in finished:
            parameter.requires_grad_(False)
        inputs, wanted = wanted, _mapped(goal, wanted)
        if place.block <= index:
            place.enter_(index, optimizer := config.optimizer.build(block))
            parts = seen, inputs, wanted
            for rate, losses in _updates(block, parts, config, updates, optimizer, place):
                context.listener(Step("tune", updates * index + place.update, total, losses, rate))
        _settle_(block)
        seen = _mapped(block, seen)
        finished.update(block.parameters())
    student.requires_grad_(True)


class _Place:
    """Where a reconstruction is: at which update of which block, and with what optimizer."""

    def __init__(self, draw: torch.Generator) -> None:
        self.draw, self.block, self.update = draw, 0, 0
        self._optimizer: dict[str, Any] | torch.optim.Optimizer | None = None

    def enter_(self, block: int, optimizer: torch.optim.Optimizer) -> None:
        """Begin a block, or go on with the one that a stop left unfinished."""
        if block != self.block:
            self.block, self.update = block, 0
        elif isinstance(self._optimizer, dict):
            optimizer.load_state_dict(self._optimizer)
        self._optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        optimizer = self._optimizer
        if isinstance(optimizer, torch.optim.Optimizer):
            optimizer = optimizer.state_dict()
        return {
            "draw": self.draw.get_state(),
            "block": self.block,
            "update": self.update,
            "optimizer": optimizer,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.draw.set_state(state["draw"])
        self.block, self.update = state["block"], state["update"]
        self._optimizer = state["optimizer"]


def _updates(
    block: fx.GraphModule,
    images: tuple[Tensor, Tensor, Tensor],
    config: Reconstruction,
    updates: int,
    optimizer: torch.optim.Optimizer,
    place: _Place,
) -> Iterator[tuple[float, dict[str, Tensor]]]:
    """Train one block from its place on; yields each update's share of the
    learning rate and its losses.

    images: the block's inputs from student and teacher, and the teacher's outputs.
    """
    weights = [m for m in block.modules() if isinstance(m, WeightQuantizer)]
    quantizers = [m for m in block.modules() if isinstance(m, ActivationQuantizer)]
    draw = place.draw
    for quantizer in quantizers:
        quantizer.dropping = QDrop(config.drop, draw) if config.drop else None
    for update in range(place.update, updates):
        rate = config.schedule.factor(update, updates)
        set_rate_(optimizer, rate)
        chosen = torch.randint(len(images[0]), (config.batch,), generator=draw)
        seen, inputs, wanted = (part[chosen] for part in images)
        if config.drop:
            seen = QDrop(config.drop, draw)(inputs, seen)
        optimizer.zero_grad()
        with torch.enable_grad():
            # Summed over channels, the mean over images and positions: channels are dimension 1
            # of feature maps and the last one of tokens and vectors.
            channels = 1 if wanted.ndim > 3 else -1
            error = (block(seen) - wanted).square().sum(channels).mean()
            loss = error
            progress = (update / updates - 0.2) / 0.8
            if progress > 0:
                sharpness = 20 + (2 - 20) * progress
                penalties = [weight.rounding_penalty(sharpness) for weight in weights]
                if learned := [penalty for penalty in penalties if penalty is not None]:
                    loss = loss + config.rounding * sum(learned)
            loss.backward()
        losses = {"student": loss.detach(), "error": error.detach()}
        stay_finite(
            losses,
            whose="block",
            when=f"update {update} of block {place.block}",
            advice="Lower the learning rate or use more bits.",
        )
        optimizer.step()
        place.update = update + 1
        yield rate, losses


def _settle_(block: fx.GraphModule) -> None:
    """What was let through or left undecided while the block was trained is so no longer."""
    for module in block.modules():
        if isinstance(module, ActivationQuantizer):
            module.dropping = None
        elif isinstance(module, WeightQuantizer):
            module.settle_()


@torch.no_grad()
def _mapped(block: fx.GraphModule, images: Tensor) -> Tensor:
    """A block's outputs for all images, a batch at a time."""
    parts = [(part, block(part)) for part in images.split(64)]
    for part, output in parts:
        if len(output) != len(part):
            raise UsageError(
                "reconstruction needs block outputs with one entry for each image; for "
                f"{len(part)} images one has {list(output.shape)}. Use recipe 'fast'."
            )
    return torch.cat([output for _, output in parts])
