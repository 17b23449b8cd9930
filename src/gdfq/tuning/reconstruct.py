"""Reconstruction: block after block, each trained to reproduce the teacher's output.

BRECQ (arXiv 2102.05426) with the mixing of QDrop (arXiv 2203.05740): the inputs of a
block are the outputs of the trained blocks before it, with some values replaced by the teacher's.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from gdfq.diffusion.weights import MinSnr
from gdfq.errors import UsageError
from gdfq.execution.context import Context
from gdfq.execution.guards import check_finite
from gdfq.execution.progress import Step
from gdfq.execution.seeding import stream as random_stream
from gdfq.files.plain_values import tagged
from gdfq.graph.batch_norms import fold_batch_norms
from gdfq.graph.blocks import Block, block_ends, blocks
from gdfq.graph.capture import Captured
from gdfq.graph.memory import forward_images
from gdfq.optim import Cosine, OptimizerConfig, Schedule, set_rate_
from gdfq.quantizers.base import ActivationQuantizer, QDrop, WeightQuantizer
from gdfq.sources.base import Batch, joined_inputs, split_inputs
from gdfq.sources.stream import Feed
from gdfq.student.build import Student
from gdfq.tuning.base import Tuning


@tagged("Reconstruction", added={"time_weights": None})
@dataclass(frozen=True)
class Reconstruction(Tuning):
    """Each block in turn minimizes E‖Q_b(x) − M_b(x)‖², summed over channels.

    Learned rounding is driven to a decision by `rounding` · Σ 1 − |2h − 1|^β, where β falls from
    20 to 2 after a fifth of the updates.

    Attributes:
        optimizer: Optimizer of the parameters of a block.
        images: Images of the stream, the first ones, that are held in memory as features.
        batch: Images that each update draws of these.
        drop: Share of the values of a block's input that is the teacher's, and of each activation
            that stays unquantized (QDrop).
        rounding: Weight of the rounding penalty.
        schedule: Of the learning rate, over the updates of a block.
        time_weights: Of a denoiser: weights of the errors by time step; None for other networks.
            Its blocks also end across the skips of a U-Net (`gdfq.graph.blocks`).
    """

    optimizer: OptimizerConfig
    images: int
    batch: int = 32
    drop: float = 0.5
    rounding: float = 0.01
    schedule: Schedule = Cosine()  # noqa: RUF009 (frozen)
    time_weights: MinSnr | None = None

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

    def weighted_by_time(self, weights: MinSnr) -> "Reconstruction":
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
        least: float = 0.0,
        context: Context = Context(),
    ) -> float:
        """Return how many seconds all updates would take, from the second update of each block.

        See `Tuning.seconds` for the arguments.
        """
        del least  # each block is measured
        times: list[float] = []
        context = Context(
            listener=lambda _: times.append(clock()),
            precision=context.precision,
            memory=context.memory,
        )
        reconstruct_(student, teacher, [batch], self, updates=2, context=context)
        # The first update of a block includes work that is done only once.
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
    """Reconstruct all blocks on the images of the batches.

    Parameters that two blocks share are trained in the first.

    Args:
        student: A student with known activation ranges, trained in place.
        teacher: The network whose blocks are reproduced.
        batches: Batches whose images are used.
        config: Loss, optimizer and schedule.
        updates: Updates of each block.
        context: Context of the run.

    Raises:
        UsageError: The output of a block does not have images as its first dimension.
        GdfqError: A loss is not finite.
    """
    network = fold_batch_norms(teacher).network
    ends = block_ends(network.graph, across_skips=config.time_weights is not None)
    student_blocks = blocks(student.network, student.named([end.name for end in ends]))
    # The inputs of the network, then the ends of blocks, as far as later blocks take them.
    exact: list[Tensor] = list(joined_inputs(batches))
    observed = list(exact)
    by_time = config.time_weights
    weights = None if by_time is None else by_time.weights(exact[1])
    total = updates * len(student_blocks)
    at_once = min(_MAX_IMAGES, forward_images(network.graph, context.memory, teacher.device))
    place = context.checkpointer.register(
        "reconstruction", _Progress(random_stream(context.seed, "reconstruct.draw"))
    )
    finished: set[nn.Parameter] = set()
    for index, (block, goal) in enumerate(zip(student_blocks, blocks(network, ends), strict=True)):
        block.network.requires_grad_(True)
        for parameter in finished:
            parameter.requires_grad_(False)
        target = _mapped(goal, exact, at_once)
        if place.block <= index:
            place.enter_(index, optimizer := config.optimizer.build(block.network))
            own, taught = ([values[i] for i in block.takes] for values in (observed, exact))
            known = _Known(own, taught, target, weights)
            for rate, losses in _updates(block.network, known, config, updates, optimizer, place):
                context.listener(Step("tune", updates * index + place.update, total, losses, rate))
        _settle_(block.network)
        observed.append(_mapped(block, observed, at_once))
        exact.append(target)
        _drop_unused_((exact, observed), student_blocks[index + 1 :])
        finished.update(block.network.parameters())
    student.requires_grad_(True)


class _Known(NamedTuple):
    """What a block is trained on.

    Attributes:
        observed: All its inputs, from the student.
        inputs: The same from the teacher.
        target: The teacher's outputs, [N, ...].
        weights: Of the squared errors of each image, [N]; None for 1.
    """

    observed: Sequence[Tensor]
    inputs: Sequence[Tensor]
    target: Tensor
    weights: Tensor | None


class _Progress:
    """Progress of a reconstruction: block, update and optimizer."""

    def __init__(self, draw: torch.Generator) -> None:
        self.draw, self.block, self.update = draw, 0, 0
        self._optimizer: dict[str, Any] | torch.optim.Optimizer | None = None

    def enter_(self, block: int, optimizer: torch.optim.Optimizer) -> None:
        """Begin a block, or resume the one that an interruption left unfinished."""
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
    known: _Known,
    config: Reconstruction,
    updates: int,
    optimizer: torch.optim.Optimizer,
    place: _Progress,
) -> Iterator[tuple[float, dict[str, Tensor]]]:
    """Train one block, starting from the stored progress.

    Args:
        block: A block of the student.
        known: What it is trained on.
        config: Loss and schedule.
        updates: Updates of the block.
        optimizer: Of the parameters of the block.
        place: Progress; it is moved on.

    Yields:
        For each update, the factor on the learning rate and the losses.
    """
    weights = [m for m in block.modules() if isinstance(m, WeightQuantizer)]
    quantizers = [m for m in block.modules() if isinstance(m, ActivationQuantizer)]
    draw = place.draw
    for quantizer in quantizers:
        quantizer.dropping = QDrop(config.drop, draw) if config.drop else None
    for update in range(place.update, updates):
        rate = config.schedule.factor(update, updates)
        set_rate_(optimizer, rate)
        chosen = torch.randint(len(known.target), (config.batch,), generator=draw)
        observed, inputs = ([tensor[chosen] for tensor in part] for part in known[:2])
        target = known.target[chosen]
        if config.drop:
            drop = QDrop(config.drop, draw)
            observed = [
                drop(exact, rounded) if rounded.is_floating_point() else rounded
                for exact, rounded in zip(inputs, observed, strict=True)
            ]
        optimizer.zero_grad()
        with torch.enable_grad():
            by_image = None if known.weights is None else known.weights[chosen]
            loss = error = _error(block(*observed), target, by_image)
            progress = (update / updates - 0.2) / 0.8
            if progress > 0:
                sharpness = 20 + (2 - 20) * progress
                penalties = [weight.rounding_penalty(sharpness) for weight in weights]
                if learned := [penalty for penalty in penalties if penalty is not None]:
                    loss = loss + config.rounding * sum(learned)
            loss.backward()
        losses = {"student": loss.detach(), "error": error.detach()}
        check_finite(
            losses,
            whose="block",
            when=f"update {update} of block {place.block}",
            advice="Lower the learning rate or use more bits.",
        )
        optimizer.step()
        place.update = update + 1
        yield rate, losses


def _settle_(block: fx.GraphModule) -> None:
    """End QDrop, and fix the rounding, in a trained block."""
    for module in block.modules():
        if isinstance(module, ActivationQuantizer):
            module.dropping = None
        elif isinstance(module, WeightQuantizer):
            module.settle_()


def _error(actual: Tensor, target: Tensor, weights: Tensor | None) -> Tensor:
    """Return the square error, summed over channels, the mean over images and positions.

    Channels are dimension 1 of feature maps, and the last one of tokens and vectors. Each image may
    have a weight, [N].
    """
    errors = (actual - target).square().sum(1 if target.ndim > 3 else -1)
    if weights is not None:
        errors = errors * weights.view(-1, *(1,) * (errors.ndim - 1))
    return errors.mean()


def _drop_unused_(tensors: Sequence[list[Tensor]], following: Sequence[Block]) -> None:
    """Free the inputs of the network and the ends of blocks that no following block takes."""
    taken = {place for block in following for place in block.takes}
    for values in tensors:
        for place in set(range(len(values))) - taken:
            values[place] = values[place].new_empty(0)


_MAX_IMAGES = 64
"""Maximum images that pass a block together: more are not faster."""


@torch.no_grad()
def _mapped(block: Block, values: Sequence[Tensor], at_once: int) -> Tensor:
    """Return the outputs of a block for all its inputs, computed in small batches."""
    inputs = [values[place] for place in block.takes]
    parts = [(part, block.network(*part)) for part in split_inputs(inputs, at_once)]
    for (part, *_), output in parts:
        if len(output) != len(part):
            raise UsageError(
                "reconstruction needs block outputs with one entry for each image; for "
                f"{len(part)} images one has {list(output.shape)}. Use recipe 'fast'."
            )
    return torch.cat([output for _, output in parts])
