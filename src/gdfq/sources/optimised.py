"""Images optimised pixel by pixel against batch-norm statistics (ZeroQ, arXiv 2001.00281)."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from gdfq.capture import Captured
from gdfq.losses import standard_deviation_loss
from gdfq.progress import Listener, Step, silent
from gdfq.randomness import stream as random_stream
from gdfq.schedules import AdamConfig
from gdfq.sources import Batch
from gdfq.statistics import StatisticsNetwork


@dataclass(frozen=True)
class OptimisedSource:
    """Each batch starts as N(0, 1) noise and follows Adam on the statistics loss.

    The loss is `standard_deviation_loss` over all batch norms and over the input itself, whose
    target is mean 0 and deviation 1. The learning rate falls tenfold whenever the loss has not
    improved for `patience` iterations. Labels are the teacher's own answers.
    """

    batch: int = 64
    iterations: int = 500
    optimizer: AdamConfig = AdamConfig(lr=0.5)  # noqa: RUF009 (frozen)
    patience: int = 100

    def stream(
        self, teacher: Captured, *, steps: int, seed: int, listener: Listener = silent
    ) -> Iterator[Batch]:
        """Yield `steps` batches. Raises UsageError for networks without batch norms."""
        network = StatisticsNetwork(teacher)
        channels = teacher.input_shape[0]
        zero, one = (torch.full((channels,), v, device=teacher.device) for v in (0.0, 1.0))
        stored = [(zero, one), *network.stored]
        draw = random_stream(seed, "optimised.draw")
        for step in range(steps):
            noise = torch.randn(self.batch, *teacher.input_shape, generator=draw)
            images = noise.to(teacher.device).requires_grad_()
            optimizer = self.optimizer.build([images])
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
                optimizer, patience=self.patience, min_lr=1e-4
            )
            for iteration in range(self.iterations):
                with torch.enable_grad():
                    _, seen = network(images)
                    loss = standard_deviation_loss([input_moments(images), *seen], stored)
                    (images.grad,) = torch.autograd.grad(loss, images)
                optimizer.step()
                plateau.step(loss.item())
                done = step * self.iterations + iteration + 1
                listener(Step("images", done, steps * self.iterations, {"bns": loss.detach()}))
            final = images.detach()
            with torch.no_grad():
                logits = teacher.network(final)
            yield Batch(final, logits.argmax(1), logits, {"bns": loss.detach()})


def input_moments(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Differentiable mean and biased variance of each channel of the images."""
    variance, mean = torch.var_mean(images, [0, *range(2, images.ndim)], correction=0)
    return mean, variance
