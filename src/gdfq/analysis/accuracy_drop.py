"""How far a student can be trusted, told without data: the accuracy that it is expected to lose.

Teacher and student look at mixtures of synthetic images that the student was not tuned on. A
synthetic image is classified with confidence, and even a poor student agrees on it; a mixture of
two lies at any distance from the border between classes, as real images do. How far the student's
logits are off there is brought to an accuracy drop by a law of two constants, measured on real test
images of several networks (docs/trust.md). Where the law was not measured there is no estimate,
only a reason.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gdfq.deploy.parity import Parity
from gdfq.execution.budget import MemoryBudget
from gdfq.execution.context import Context
from gdfq.execution.progress import Listener, Step, silent
from gdfq.execution.seeding import stream as random_stream
from gdfq.functional.losses import distillation_loss
from gdfq.graph.capture import Captured
from gdfq.graph.memory import forward_images
from gdfq.graph.outputs import in_order
from gdfq.optim import AdamConfig
from gdfq.sources.input_scale import InputStatistics
from gdfq.sources.pool import collect
from gdfq.sources.spectral import SpectralSource, natural_noise


@dataclass(frozen=True)
class Trust:
    """What can be said of a student without labels or real images.

    Its figures are of held-out images: none that the student was tuned on.
    """

    source: str
    """Where the images come from."""
    images: int
    relative_error: float | None
    """‖ŷ − y‖ / ‖y‖ in percent over all numbers of an output y; of several outputs the worst.
    None where an output is not finite, as with `kl`."""
    agreement: float | None = None
    """Images on which both networks answer the same class, in percent; None without classes."""
    kl: float | None = None
    """Mean KL(teacher ‖ student) of the classes' probabilities, in nats; None without classes."""
    expected_drop: float | None = None
    """Points of top-1 accuracy that the student is expected to lose; None: cannot tell."""
    interval: tuple[float, float] | None = None
    """Points between which nine of ten students of networks that the law had not seen lay."""
    reason: str = ""
    """Why there is no estimate; empty where there is one."""

    def as_values(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Law:
    """From the logits' error to the drop, whose odds are a power of it.

        d / (1 − d) = exp(shift) · x^power

    x is the error of `comparable`, d the drop of top-1 accuracy as a share. `error` is that of
    log(1 + drop in points), in nine of ten cases and more: small drops are known to a point or so,
    large ones to a factor. Above `limit` x has no law.
    """

    shift: float
    power: float
    error: float
    limit: float

    def drop(self, x: float) -> float:
        """Expected drop in points."""
        odds: float = math.exp(self.shift) * x**self.power
        return 100 * odds / (1 + odds)

    def interval(self, drop: float) -> tuple[float, float]:
        """Around an expected drop, in points; neither end lies outside 0..100."""
        low, high = ((1 + drop) * math.exp(sign * self.error) - 1 for sign in (-1, 1))
        return max(low, 0.0), min(high, 100.0)


LAW = Law(shift=-0.84, power=2.44, error=0.63, limit=0.7)
"""Fitted by `python benchmarks/trust.py`; its runs are in benchmarks/results/trust.json."""


@dataclass(frozen=True)
class _AsFitted(SpectralSource):
    """Images of mean 0, deviation 1, one contrast and similar brightness, whatever the network.

    Such were the images that the law was fitted on, so it holds for no others, and every setting
    stands here whatever the recipes' images become.
    """

    batch: int = 128
    iterations: int = 30
    optimizer: AdamConfig = AdamConfig(lr=0.05, betas=(0.8, 0.95))  # noqa: RUF009 (frozen)
    exponent: float = 1.5
    dc_power: float = 0.06
    channel_correlation: float = 0.85
    class_weight: float = 0.01
    focus: float = 2.0

    def input_statistics(self, teacher: Captured, seed: int) -> InputStatistics:  # noqa: ARG002 (of all the same)
        return InputStatistics.unit(teacher)


_SOURCE = _AsFitted()
_MOST, _FEWEST, _PIXELS = 64, 32, 64 * 64**2
"""Images that are made: the most, but of large ones only as many as have that many pixels, and not
fewer than the fewest."""
_MIXTURES = 4
"""For each image that is made."""
_MAX_TOGETHER = 32
"""Images that pass a network together."""


def measure(
    teacher: Captured,
    network: nn.Module,
    *,
    seed: int,
    listener: Listener = silent,
    memory: MemoryBudget = MemoryBudget(),
) -> Trust:
    """Compare a student with its teacher on held-out images, and say what drop that means.

    network: maps [N, *input_shape] to what the teacher's graph returns, on the teacher's device.
    seed: the run's; the images are others than those of any recipe with this seed.
    """
    # A seed of its own keeps the images apart from those that a recipe of the same seed makes.
    seed = random_stream(seed, "trust").initial_seed()
    if reason := _out_of_reach(teacher):
        kind, draw = "noise with the spectrum of natural images", random_stream(seed, "trust.noise")
        images = natural_noise(_MOST, teacher.input_shape, _SOURCE, draw).to(teacher.device)
    else:
        kind, images = "mixtures of images made for this", held_out(teacher, seed, listener, memory)
    wanted, got = _answers(teacher, network, images, listener, memory)
    return judged(
        wanted, got, source=kind, is_classifier=teacher.classes is not None, reason=reason
    )


def judged(
    wanted: Sequence[Tensor],
    got: Sequence[Tensor],
    *,
    source: str,
    is_classifier: bool = True,
    reason: str = "",
) -> Trust:
    """What the outputs [N, ...] of a teacher and its student on the same images say.

    reason: why no estimate may be made of them, if so.
    """
    parity = Parity.of(wanted, got, is_classifier)
    error = _finite(100 * parity.relative_error)
    seen = Trust(source, len(wanted[0]), error, parity.agreement, reason=reason)
    if parity.agreement is None:
        return seen
    kl = float(distillation_loss(got[0], wanted[0], 1.0, "batch"))
    seen = replace(seen, kl=_finite(kl))
    x = comparable(parity.relative_error, wanted[0].shape[1])
    if reason := reason or _out_of_range(wanted[0], x):
        return replace(seen, reason=reason)
    drop = LAW.drop(x)
    return replace(seen, expected_drop=drop, interval=LAW.interval(drop))


def comparable(relative_error: float, classes: int) -> float:
    """The error of the logits that would do as much harm among ten classes.

    The answer changes when noise lifts any of C logits above the highest, and the greatest of C
    normal deviates grows as √(2 ln C).
    """
    return relative_error * math.sqrt(math.log(classes) / math.log(10))


def made(
    teacher: Captured,
    seed: int,
    listener: Listener = silent,
    memory: MemoryBudget = MemoryBudget(),
) -> Tensor:
    """Spectral images [N, *input_shape]. Raises what `SpectralSource` does."""
    fitting = _PIXELS // math.prod(teacher.input_shape[1:])
    count = max(_FEWEST, min(_MOST, fitting))
    context = Context(seed=seed, listener=listener, memory=memory)
    images, _ = collect(replace(_SOURCE, batch=count), teacher, count, context=context)
    return images


def held_out(
    teacher: Captured,
    seed: int,
    listener: Listener = silent,
    memory: MemoryBudget = MemoryBudget(),
) -> Tensor:
    """Mixtures [N, *input_shape] of images that are made for this. Raises what `made` does."""
    images = made(teacher, seed, listener, memory)
    return mixed(images, _MIXTURES * len(images), random_stream(seed, "trust.mixtures"))


def mixed(images: Tensor, count: int, draw: torch.Generator) -> Tensor:
    """λ a + (1 − λ) b for random pairs of images a, b and random λ in 0.5..1; [count, ...]."""
    first, second = (torch.randint(len(images), (count,), generator=draw) for _ in range(2))
    share = 0.5 + 0.5 * torch.rand(count, generator=draw)
    share = share.to(images.device).view(-1, *([1] * (images.ndim - 1)))
    return share * images[first] + (1 - share) * images[second]


@torch.no_grad()
def _answers(
    teacher: Captured,
    student: nn.Module,
    images: Tensor,
    listener: Listener,
    memory: MemoryBudget,
) -> tuple[list[Tensor], list[Tensor]]:
    """All outputs [N, ...] of both networks, on the CPU."""
    parts = images.split(
        min(_MAX_TOGETHER, forward_images(teacher.network.graph, memory, images.device))
    )
    found = []
    for step, part in enumerate(parts, start=1):
        found.append([in_order(network(part)) for network in (teacher.network, student)])
        listener(Step("trust", step, len(parts), {}))
    wanted, got = (
        [torch.cat(tensors).cpu() for tensors in zip(*answers, strict=True)]
        for answers in zip(*found, strict=True)
    )
    return wanted, got


def _finite(figure: float) -> float | None:
    return figure if math.isfinite(figure) else None


def _out_of_reach(teacher: Captured) -> str:
    """Why the law does not hold for any student of this teacher; empty where it may."""
    if teacher.classes is None:
        return "Accuracy is for classifiers, and the outputs of this network are not classes."
    if not teacher.batch_norms or len(teacher.input_shape) != 3:
        return (
            "The estimate was validated on networks that have batch norms and take images; this "
            "one is another. Measure on real inputs (--test)."
        )
    return ""


def _out_of_range(wanted: Tensor, x: float) -> str:
    """Why the teacher's logits [N, C], or such an error, tell nothing; empty where they do."""
    if not math.isfinite(x):
        return "The student's outputs are not finite."
    if len(wanted.argmax(1).unique()) < 2:
        return (
            "The teacher gives the same answer to all of the held-out images: they do not stand "
            "for its inputs. Measure on real images (--test)."
        )
    if x > LAW.limit:
        return (
            f"The student's logits are off by {x:.0%} (as among ten classes). Beyond "
            f"{LAW.limit:.0%} the loss was large wherever it was measured, but no figure fits it."
        )
    return ""
