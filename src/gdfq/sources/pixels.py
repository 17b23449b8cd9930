"""Images optimised pixel by pixel against batch-norm statistics (ZeroQ, arXiv 2001.00281).

With a class loss and a low-pass filter they are those of SynQ (arXiv 2603.18423).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gdfq.errors import UsageError
from gdfq.execution.context import Context
from gdfq.execution.guards import check_images_finite
from gdfq.execution.progress import Step
from gdfq.execution.replay import Replayed
from gdfq.execution.seeding import stream as random_stream
from gdfq.files.plain_values import tagged
from gdfq.functional.losses import focal_loss, standard_deviation_loss
from gdfq.graph.capture import Captured
from gdfq.graph.statistics import StatisticsNetwork, unit_input
from gdfq.optim import AdamConfig
from gdfq.sources.base import Batch, Source, labels_in_turn
from gdfq.sources.stream import InTurn, Stream


@tagged("OptimisedSource")
@dataclass(frozen=True)
class OptimisedSource(Source):
    """Each batch starts as N(0, 1) noise and follows Adam on the statistics loss.

    The loss is `standard_deviation_loss` over all batch norms and over the input itself, whose
    target is mean 0 and deviation 1, plus `class_weight` times `focal_loss`, with labels that cover
    the classes in turn. Without a class weight the labels are the predictions of the teacher. A
    network without classes has neither.

    Attributes:
        batch: Images per batch.
        iterations: Updates of each batch.
        optimizer: Of the pixels.
        patience: The learning rate falls tenfold when the loss has not improved for so many
            iterations.
        class_weight: Weight of the class loss.
        focus: Exponent γ of the focal class loss.
        cutoff: Of the filter `low_passed` on the finished images, in cycles per image; None for no
            filter.
    """

    batch: int = 64
    iterations: int = 500
    optimizer: AdamConfig = AdamConfig(lr=0.5)  # noqa: RUF009 (frozen)
    patience: int = 100
    class_weight: float = 0.0
    focus: float = 2.0
    cutoff: float | None = None

    def stream(
        self,
        teacher: Captured,
        *,
        steps: int,
        context: Context = Context(),
    ) -> Stream:
        """Yield `steps` batches.

        Raises:
            UsageError: The network has no batch norms, or there is a cutoff and the inputs have no
                spatial axis.
        """
        network = StatisticsNetwork(teacher, of_input=unit_input(teacher), memory=context.memory)
        if self.cutoff is not None and len(teacher.input_shape) < 2:
            raise UsageError(
                "images that pass a filter need one spatial axis or more; this network takes "
                f"vectors of {teacher.input_shape[0]}. Use recipe 'zeroq', or give real inputs "
                "(--data, or data=...)."
            )
        optimisation = _Optimisation(self, teacher, network, steps, context)
        in_turn = InTurn(
            optimisation.noise, optimisation.optimised, steps, context.group, teacher.device
        )

        def make(step: int) -> Batch:
            images = in_turn(step)
            labels = labels_in_turn(teacher, step, self.batch)
            with torch.no_grad():
                logits = teacher.logits(images)
            if logits is not None and not self.class_weight:
                labels = logits.argmax(1)
            return Batch((images,), labels, logits, optimisation.losses)

        return Stream(make, steps, [optimisation.draw], {"images": in_turn})


class _Losses:
    """The loss of images [N, *input_shape] and labels [N], and its statistics part for the log."""

    def __init__(
        self, config: OptimisedSource, network: StatisticsNetwork, context: Context
    ) -> None:
        self.config, self.network, self.context = config, network, context

    def __call__(self, images: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        with self.context.autocast(images.device):
            outputs, seen = self.network(images)
        bns = standard_deviation_loss(seen, self.network.stored)
        if not self.config.class_weight or labels is None:
            return bns, bns.detach()
        focal = focal_loss(outputs, labels, self.config.focus)
        return bns + self.config.class_weight * focal, bns.detach()


class _Optimisation:
    """Optimises the images of one batch after the other.

    Attributes:
        draw: Randomness of the noise.
        losses: Of the last images, for the log.
    """

    def __init__(
        self,
        config: OptimisedSource,
        teacher: Captured,
        network: StatisticsNetwork,
        steps: int,
        context: Context,
    ) -> None:
        self.config, self.teacher, self.steps = config, teacher, steps
        self.listener = context.listener
        self.draw = random_stream(context.seed, "optimised.draw")
        self.losses: dict[str, Tensor] = {}
        self.evaluated = Replayed(_Losses(config, network, context))

    def noise(self) -> Tensor:
        """Draw what the images of a batch start from."""
        shape = self.config.batch, *self.teacher.input_shape
        return torch.randn(shape, generator=self.draw).to(self.teacher.device)

    def optimised(self, step: int, start: Tensor) -> Tensor:
        """Return the images of a batch."""
        config, images = self.config, start.requires_grad_()
        optimizer = config.optimizer.build([images])
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, patience=config.patience, min_lr=1e-4
        )
        labels = labels_in_turn(self.teacher, step, config.batch)
        for iteration in range(config.iterations):
            with torch.enable_grad():
                loss, bns = self.evaluated(images, labels)
                check_images_finite({"total": loss.detach(), "bns": bns}, step, iteration)
                (images.grad,) = torch.autograd.grad(loss, images)
            optimizer.step()
            plateau.step(loss.item())
            done = step * config.iterations + iteration + 1
            self.losses = {"bns": bns}
            self.listener(Step("images", done, self.steps * config.iterations, self.losses))
        if step == self.steps - 1:
            self.evaluated.forget()
        final = images.detach()
        return final if config.cutoff is None else low_passed(final, config.cutoff)


def low_passed(images: Tensor, cutoff: float) -> Tensor:
    """Return images with each frequency times exp(−d² / 2 cutoff²) (arXiv 2603.18423).

    Args:
        images: [N, C, *size].
        cutoff: In cycles per image, as is d, the distance of the frequency from 0.
    """
    size = images.shape[2:]
    axes = [torch.fft.fftfreq(side, 1 / side) for side in size[:-1]]
    axes.append(torch.fft.rfftfreq(size[-1], 1 / size[-1]))
    distance = torch.stack(torch.meshgrid(*axes, indexing="ij")).square().sum(0)
    weight = (-distance / (2 * cutoff**2)).exp().to(images.device)
    dims = list(range(2, images.ndim))
    spectrum = torch.fft.rfftn(images, dim=dims) * weight
    filtered: Tensor = torch.fft.irfftn(spectrum, s=size, dim=dims)
    layout = torch.channels_last if images.ndim == 4 else torch.contiguous_format
    return filtered.contiguous(memory_format=layout)
