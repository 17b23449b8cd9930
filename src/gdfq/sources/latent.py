"""Images from latents that are optimised with a generator of their own (GENIE, arXiv 2212.04780).

Each batch gets a fresh small generator, and both its weights and its inputs follow the teacher's
batch-norm statistics. Meanwhile the input of every strided convolution of the teacher is shifted by
a random number of pixels ("swing convolution"), so that all pixels get a gradient.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from gdfq.errors import UsageError
from gdfq.execution.context import Context
from gdfq.execution.guards import check_images_finite
from gdfq.execution.progress import Step
from gdfq.execution.seeding import stream as random_stream
from gdfq.files.plain_values import tagged
from gdfq.functional.losses import standard_deviation_loss
from gdfq.functional.upsample_conv import upsampled_convolution
from gdfq.graph import operators, queries
from gdfq.graph.capture import Captured
from gdfq.graph.rewrite import Copy, rewrite
from gdfq.graph.statistics import StatisticsNetwork, unit_input
from gdfq.graph.tensors import flat_module, tensors_of
from gdfq.optim import AdamConfig, Cosine, set_rate_
from gdfq.sources.base import Batch, Source
from gdfq.sources.stream import Stream


@tagged("LatentSource")
@dataclass(frozen=True)
class LatentSource(Source):
    """Each batch follows Adam on `standard_deviation_loss`, with its latents and its generator.

    Labels are the predictions of the teacher.

    Attributes:
        batch: Images per batch.
        iterations: Updates of each batch.
        latent: Size of z.
        latents: Optimizer of the latents.
        generator: Optimizer of the generator.
    """

    batch: int = 128
    iterations: int = 100
    latent: int = 256
    latents: AdamConfig = AdamConfig(lr=0.1)  # noqa: RUF009 (frozen)
    generator: AdamConfig = AdamConfig(lr=0.01)  # noqa: RUF009 (frozen)

    def stream(
        self,
        teacher: Captured,
        *,
        steps: int,
        context: Context = Context(),
    ) -> Stream:
        """Yield `steps` batches.

        Raises:
            UsageError: The network has no batch norms, or its inputs are not images [C, H, W].
        """
        if len(teacher.input_shape) != 3:
            raise UsageError(
                "the generator makes images [channels, height, width]; "
                f"this network takes {list(teacher.input_shape)}. Give real data instead."
            )
        swing, draw = (
            random_stream(context.seed, f"latent.{purpose}") for purpose in ("swing", "draw")
        )
        network = StatisticsNetwork(swinging(teacher, swing), of_input=unit_input(teacher))
        device = teacher.device

        def make(step: int) -> Batch:
            generator = LatentGenerator(teacher.input_shape, self.latent, draw).to(device)
            z = torch.randn(self.batch, self.latent, generator=draw).to(device).requires_grad_()
            optimizers = (
                self.latents.build([z]),
                self.generator.build(generator.parameters()),
            )
            for iteration in range(self.iterations):
                with torch.enable_grad():
                    images = generator(z)
                    _, seen = network(images)
                    loss = standard_deviation_loss(seen, network.stored)
                    for optimizer in optimizers:
                        set_rate_(optimizer, Cosine().factor(iteration, self.iterations))
                        optimizer.zero_grad()
                    check_images_finite({"bns": loss.detach()}, step, iteration)
                    loss.backward()
                for optimizer in optimizers:
                    optimizer.step()
                done = step * self.iterations + iteration + 1
                context.listener(
                    Step("images", done, steps * self.iterations, {"bns": loss.detach()})
                )
            with torch.no_grad():
                images = generator(z)
                logits = teacher.logits(images)
            labels = None if logits is None else logits.argmax(1)
            return Batch((images,), labels, logits, {"bns": loss.detach()})

        return Stream(make, steps, [swing, draw])


class LatentGenerator(nn.Module):
    """z [N, latent] -> images [N, channels, height, width] of zero mean and unit variance.

    linear → BN → up ×2 → conv 3×3 (64) → BN → LeakyReLU 0.2 → up ×2 → conv 3×3 → tanh → BN
    without affine parameters.
    """

    _WIDTHS = (128, 64)

    def __init__(self, image_shape: tuple[int, ...], latent: int, random: torch.Generator) -> None:
        super().__init__()
        channels, *self.size = image_shape
        self.base = [math.ceil(side / 4) for side in self.size]
        first, second = self._WIDTHS
        shapes = (
            (first * math.prod(self.base), latent),
            (second, first, 3, 3),
            (channels, second, 3, 3),
        )
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for shape in shapes:  # PyTorch's default initialisation, from an explicit stream
            bound = 1 / math.sqrt(math.prod(shape[1:]))
            for parameters, size in ((self.weights, shape), (self.biases, shape[:1])):
                values = torch.rand(size, generator=random).mul_(2 * bound).sub_(bound)
                parameters.append(nn.Parameter(values))
        self.scales = nn.ParameterList(torch.ones(width) for width in self._WIDTHS)
        self.shifts = nn.ParameterList(torch.zeros(width) for width in self._WIDTHS)

    def forward(self, z: Tensor) -> Tensor:
        x = F.linear(z, self.weights[0], self.biases[0]).view(-1, self._WIDTHS[0], *self.base)
        x = F.batch_norm(x, None, None, self.scales[0], self.shifts[0], training=True)
        x = upsampled_convolution(x, self.weights[1], self.biases[1])
        x = F.batch_norm(x, None, None, self.scales[1], self.shifts[1], training=True)
        x = upsampled_convolution(F.leaky_relu(x, 0.2), self.weights[2], self.biases[2])
        x = x[..., : self.size[0], : self.size[1]].tanh()
        x = F.batch_norm(x, None, None, training=True)
        return x.contiguous(memory_format=torch.channels_last)


def swinging(teacher: Captured, draw: torch.Generator) -> Captured:
    """Return the teacher with the input of each strided 2-d convolution shifted at random.

    The shift is at most stride − 1 pixels and is drawn for each call. The border is mirrored.
    """

    def change(copy: Copy, node: fx.Node) -> fx.Node | None:
        if operators.name_of(node) not in operators.CONVOLUTIONS_2D:
            return None
        stride = node.args[3] if len(node.args) > 3 else 1
        reach = max(stride) - 1 if isinstance(stride, list | tuple) else 0
        if not reach:
            return None
        new = copy.of(node)
        with copy.graph.inserting_before(new):
            arguments = (copy[queries.input_of(node)],)
            moved = copy.graph.call_function(_mover(reach, draw), arguments)
        new.update_arg(0, moved)
        return new

    graph = rewrite(teacher.network.graph, change)
    return replace(teacher, network=flat_module(graph, tensors_of(teacher.network)))


def _mover(reach: int, draw: torch.Generator) -> Callable[[Tensor], Tensor]:
    def moved(x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        if reach >= min(height, width):  # nothing to mirror
            return x
        top, left = torch.randint(2 * reach + 1, (2,), generator=draw).tolist()
        padded = F.pad(x, [reach] * 4, mode="reflect")
        return padded[:, :, top : top + height, left : left + width]

    return moved
