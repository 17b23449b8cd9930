"""The knowledge-matching generator of GDFQ (arXiv 2003.03603, section 3.2) as a source.

It learns from the teacher alone: its loss has no term of the student, so its batches are a stream
that anything downstream can take.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdfq.errors import UsageError
from gdfq.execution.context import Context
from gdfq.execution.distributed import ALONE, Group
from gdfq.execution.guards import check_finite
from gdfq.execution.precision import to_float32
from gdfq.execution.replay import Replayed
from gdfq.execution.seeding import stream as random_stream
from gdfq.files.plain_values import tagged
from gdfq.files.states import Stateful
from gdfq.functional.losses import batch_norm_statistics_loss, class_boundary_loss
from gdfq.functional.upsample_conv import upsampled_convolution
from gdfq.graph.capture import Captured
from gdfq.graph.statistics import StatisticsNetwork
from gdfq.optim import AdamConfig, StepDecay, set_rate_
from gdfq.sources.base import Batch, Source
from gdfq.sources.collapse import CollapseWatch
from gdfq.sources.stream import Stream

Conditioning = Literal["label-embedding", "conditional-batch-norm"]

_HIDDEN = (128, 128, 64)
_NORM_EPS, _OUTPUT_EPS = (1e-5, 0.8, 0.8), 1e-5
"""The published code passes 0.8 as eps of the second and third norm; its results depend on it."""


class Generator(nn.Module):
    """z [N, latent], y [N] -> images [N, channels, height, width] of zero mean and unit variance.

    linear → BN → (up ×2 → conv 3×3 → BN → LeakyReLU 0.2) twice → conv 3×3 → tanh → BN without
    affine parameters. The class enters in one of the two published forms: "label-embedding"
    multiplies z by a learned embedding of y (CIFAR), "conditional-batch-norm" gives each class
    its own scale and shift in the three batch norms (ImageNet).

    The output's batch norm makes images zero-mean and unit-variance per channel, which is the
    normalised input space of a network. Sizes that are not multiples of 4 are generated at the
    next multiple and cropped at the centre.
    """

    def __init__(
        self,
        image_shape: tuple[int, ...],
        classes: int,
        *,
        latent: int,
        conditioning: Conditioning,
        random: torch.Generator,
    ) -> None:
        super().__init__()
        channels, *self.size = image_shape
        self.latent = latent
        self.base = [math.ceil(s / 4) for s in self.size]
        embeds = conditioning == "label-embedding"
        first, second, third = _HIDDEN
        with torch.device("meta"):  # no initialisation from the global random state
            self.embedding = nn.Embedding(classes, latent) if embeds else None
            self.linear = nn.Linear(latent, first * math.prod(self.base))
            self.norms = nn.ModuleList(
                _ConditionalNorm(1 if embeds else classes, width, eps)
                for width, eps in zip(_HIDDEN, _NORM_EPS, strict=True)
            )
            self.convolutions = nn.ModuleList(
                nn.Conv2d(i, o, 3, padding=1)
                for i, o in ((first, second), (second, third), (third, channels))
            )
        self.to_empty(device="cpu")
        _initialise(self, random)

    def forward(self, z: Tensor, labels: Tensor, group: Group = ALONE) -> Tensor:
        if self.embedding is not None:
            z, labels = z * self.embedding(labels), torch.zeros_like(labels)
        x = self.linear(z).view(-1, _HIDDEN[0], *self.base)
        x = self.norms[0](x, labels, group)
        for convolution, norm in zip(self.convolutions, list(self.norms)[1:], strict=False):
            weight, bias = convolution.parameters()
            x = upsampled_convolution(x, weight, bias)
            x = F.leaky_relu_(norm(x, labels, group), 0.2)
        x = self.convolutions[2](x).tanh()
        x = group.batch_norm(x, None, None, _OUTPUT_EPS)
        top, left = ((4 * b - s) // 2 for b, s in zip(self.base, self.size, strict=True))
        return x[..., top : top + self.size[0], left : left + self.size[1]]


class _ConditionalNorm(nn.Module):
    """Batch norm over the batch, with a scale and shift for each class (one for all if 1)."""

    def __init__(self, classes: int, channels: int, eps: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(classes, channels))
        self.shift = nn.Parameter(torch.empty(classes, channels))
        self.eps = eps

    def forward(self, x: Tensor, labels: Tensor, group: Group) -> Tensor:
        if len(self.scale) == 1:
            return group.batch_norm(x, self.scale[0], self.shift[0], self.eps)
        x = group.batch_norm(x, None, None, self.eps)
        scale, shift = (p[labels][:, :, None, None] for p in (self.scale, self.shift))
        return torch.addcmul(shift, x, scale)


@torch.no_grad()
def _initialise(generator: Generator, random: torch.Generator) -> None:
    """PyTorch's default initialisations, drawn from an explicit random stream."""
    if generator.embedding is not None:
        generator.embedding.weight.normal_(generator=random)
    for layer in (generator.linear, *generator.convolutions):
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        assert layer.bias is not None
        bound = 1 / math.sqrt(layer.weight[0].numel())
        layer.weight.uniform_(-bound, bound, generator=random)
        layer.bias.uniform_(-bound, bound, generator=random)
    for norm in generator.norms:
        assert isinstance(norm, _ConditionalNorm)
        norm.scale.fill_(1)
        norm.shift.fill_(0)


@tagged("GeneratorSource")
@dataclass(frozen=True)
class GeneratorSource(Source):
    """Images of a generator that is trained while it makes them.

    L(G) = class_boundary · L_CE + statistics · L_BNS              (β = statistics)

    Each step is one update of the generator on a new batch, then that batch is yielded, as
    published. For a network whose outputs are not classes there is one label and no L_CE.

    Attributes:
        batch: Images per batch.
        conditioning: How the class enters the generator (see `Generator`).
        latent: Size of z.
        class_boundary: Weight of L_CE.
        statistics: Weight of L_BNS.
        optimizer: Of the generator.
        decay: Of its learning rate.
        head_start: Updates before the first batch is yielded, as a fraction of the steps (1: the
            generator is trained first).
        stop: Fraction of the yielded batches after which the generator is no longer trained.
    """

    batch: int
    conditioning: Conditioning = "label-embedding"
    latent: int = 100
    class_boundary: float = 1.0
    statistics: float = 0.1
    optimizer: AdamConfig = AdamConfig(lr=1e-3, betas=(0.5, 0.999))  # noqa: RUF009 (frozen)
    decay: StepDecay = StepDecay()  # noqa: RUF009 (frozen)
    head_start: float = 0.0
    stop: float = 1.0

    def stream(
        self,
        teacher: Captured,
        *,
        steps: int,
        context: Context = Context(),
    ) -> Stream:
        """Yield `steps` batches, and train the generator on the way.

        Raises:
            UsageError: The inputs are not images [C, H, W], or the statistics loss has a weight and
                the network has no batch norms.
            GdfqError: The loss is not finite, or the generator collapses
                (`gdfq.sources.collapse`).
        """
        if len(teacher.input_shape) != 3:
            raise UsageError(
                "the generator makes images [channels, height, width]; "
                f"this network takes {list(teacher.input_shape)}. Give real data instead."
            )
        config = self if teacher.classes is not None else replace(self, class_boundary=0.0)
        phases = _Phases.of(config, steps)
        training = _Training(config, teacher, phases, context)
        parts: dict[str, Stateful] = {
            "generator": training.generator,
            "optimizer": training.optimizer,
            "watch": training.watch,
        }
        return Stream(
            training.make,
            steps,
            [training.draw],
            parts,
            ahead=phases.ahead,
            listener=context.listener,
        )

    @property
    def learns(self) -> bool:
        """Whether a loss trains the generator."""
        return bool(self.class_boundary or self.statistics)


@dataclass(frozen=True)
class _Phases:
    """Numbers of the batches of a generator.

    Attributes:
        ahead: Made before the first one that is yielded.
        total: Made.
        updates: That update the generator; the first ones do.
        planned: That the schedule of the learning rate counts: stopping early leaves it.
    """

    ahead: int
    total: int
    updates: int
    planned: int

    @classmethod
    def of(cls, config: GeneratorSource, steps: int) -> "_Phases":
        ahead = round(config.head_start * steps)
        total = ahead + steps
        updates = ahead + round(config.stop * steps) if config.learns else 0
        return cls(ahead, total, updates, planned=total if config.stop else ahead)


class _Training:
    """Makes the batches of a stream, and trains the generator on the way."""

    def __init__(
        self, config: GeneratorSource, teacher: Captured, phases: _Phases, context: Context
    ) -> None:
        self.config, self.teacher, self.phases, self.group = config, teacher, phases, context.group
        loss = _GeneratorLoss(config, teacher, context)
        self.generator = Generator(
            teacher.input_shape,
            teacher.classes or 1,
            latent=config.latent,
            conditioning=config.conditioning,
            random=random_stream(context.seed, "generator.init"),
        ).to(teacher.device)
        self.optimizer = config.optimizer.build(self.generator.parameters())
        self.draw = random_stream(context.seed, "generator.draw")
        self.watch = CollapseWatch()
        forward = _Forward(self.generator, loss, context.group, teacher.classes is not None)
        self.replayed = Replayed(forward, self.generator.parameters())
        # Processes that share a batch exchange its statistics inside.
        self.forward = self.replayed if context.group.size == 1 else forward

    def make(self, step: int) -> Batch:
        """Return a batch; a generator that still learns is updated on it."""
        z, labels = self._drawn()
        updates = step < self.phases.updates
        # The consumer's gradient mode must not reach in here, nor ours reach out.
        with torch.set_grad_enabled(updates):
            made, losses = self.forward(self.group.shard(z), self.group.shard(labels))
            if updates:
                self._update_(step, losses["generator"])
        detached = {name: self.group.mean(value.detach()) for name, value in losses.items()}
        check_finite(
            detached,
            whose="generator",
            when=f"step {step}",
            advice="Use another seed, and check that mean and std are the network's own.",
        )
        made = {name: self.group.gather(value) for name, value in made.items()}
        images, logits = made["images"], made.get("logits")
        if step == self.phases.total - 1:
            self.replayed.forget()
        if self.config.learns:
            self.watch.check(step, images, logits if self.config.class_boundary else None, labels)
        return Batch((images,), None if logits is None else labels, logits, detached)

    def _drawn(self) -> tuple[Tensor, Tensor]:
        """Draw z [N, latent] and labels [N]."""
        z = torch.randn(self.config.batch, self.config.latent, generator=self.draw)
        classes = self.teacher.classes or 1
        labels = torch.randint(classes, (self.config.batch,), generator=self.draw)
        return z.to(self.teacher.device), labels.to(self.teacher.device)

    def _update_(self, step: int, loss: Tensor) -> None:
        """Update the generator with the gradients of its loss."""
        set_rate_(self.optimizer, self.config.decay.factor(step, self.phases.planned))
        self.optimizer.zero_grad()
        loss.backward()
        self.group.average_(parameter.grad for parameter in self.generator.parameters())
        self.optimizer.step()


class _Forward:
    """z [n, latent], y [n] -> images, logits of the teacher if it has classes; and the losses."""

    def __init__(
        self, generator: Generator, loss: "_GeneratorLoss", group: Group, has_classes: bool
    ) -> None:
        self.generator, self.loss, self.group = generator, loss, group
        self.has_classes = has_classes

    def __call__(self, z: Tensor, labels: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        images = self.generator(z, labels, self.group)
        outputs, losses = self.loss(images, labels)
        made = {"images": images.detach()}
        if self.has_classes:
            made["logits"] = to_float32(outputs.detach())
        return made, losses


class _GeneratorLoss:
    """L(G) with its parts for the log; parts of weight 0 are not computed."""

    def __init__(self, config: GeneratorSource, teacher: Captured, context: Context) -> None:
        self.config, self.context = config, context
        self.teacher = teacher.network
        self.with_statistics = StatisticsNetwork(teacher) if config.statistics else None

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Any, dict[str, Tensor]]:
        total = images.new_zeros(())
        losses: dict[str, Tensor] = {}
        if self.with_statistics is not None:
            with self.context.autocast(images.device):
                outputs, seen = self.with_statistics(images)
            seen = self.context.group.moments(seen)
            bns = batch_norm_statistics_loss(seen, self.with_statistics.stored)
            losses["bns"] = bns.detach()
            total = total + self.config.statistics * bns
        else:
            with self.context.autocast(images.device):
                outputs = self.teacher(images)
        if self.config.class_boundary:
            boundary = class_boundary_loss(outputs, labels)
            losses["boundary"] = boundary.detach()
            total = total + self.config.class_boundary * boundary
        return outputs, {"generator": total, **losses}
