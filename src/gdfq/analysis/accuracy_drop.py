"""The expected accuracy drop of a student, estimated without real data.

Teacher and student classify mixtures of synthetic images that the student was not tuned on. A
teacher classifies a synthetic image with high confidence, and even a poor student agrees with it. A
mixture of two images lies at any distance from the boundary between two classes, as real images do.
A law with two constants, fitted to drops on the real test images of several networks
(docs/trust.md), maps the error of the student's logits to an accuracy drop. Where the law was not
validated, there is no estimate, but a reason.

A change of the logits that changes no prediction changes no estimate: a number that is added to all
logits of an image, a factor on all logits of a network, another order of the classes, a copy of a
class.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gdfq.analysis.similarity import compare_outputs
from gdfq.analysis.work import Work
from gdfq.execution.budget import MemoryBudget
from gdfq.execution.context import Context
from gdfq.execution.precision import in_full_float32
from gdfq.execution.progress import Listener, Step, silent
from gdfq.execution.seeding import stream as random_stream
from gdfq.functional.grid import UNLIMITED
from gdfq.functional.losses import distillation_loss
from gdfq.graph import operators
from gdfq.graph.capture import Captured
from gdfq.graph.ends import NO_ENDS, Ends
from gdfq.graph.memory import forward_images
from gdfq.graph.outputs import in_order
from gdfq.optim import AdamConfig
from gdfq.sources.input_scale import InputStatistics
from gdfq.sources.pool import collect
from gdfq.sources.spectral import SpectralSource, natural_noise
from gdfq.student.integer_network import IntegerNetwork

Outputs = tuple[Sequence[Tensor], Sequence[Tensor]]
"""The outputs of a teacher and of its student on the same images, each [N, ...]."""


@dataclass(frozen=True)
class DropEstimate:
    """The comparison of a student with its teacher without labels or real images.

    All numbers are measured on held-out images, which the student was not tuned on.

    Attributes:
        source: Where the images come from.
        images: Number of images.
        relative_error: ‖ŷ − y‖ / ‖y‖ in percent over all numbers of an output; the largest of
            several outputs and of all kinds of images. Logits in front of a softmax are centred
            for each image first (`gdfq.analysis.similarity`). None if an output is not finite.
        agreement: Share of images for which both networks predict the same class, in percent; None
            without classes.
        kl: Mean KL(teacher ‖ student) of the class probabilities, in nats; None without classes or
            if an output is not finite.
        cosine: Mean cosine between the vectors of student and teacher, on the kind of images where
            it is smallest; None if the outputs are not unit vectors.
        decisions: Share of the numbers in front of a sigmoid that have the same sign in both
            networks, in percent: of probabilities on the same side of one half. None without.
        logit_error: The error that the law takes (`logit_error`), in percent; None without classes.
        expected_drop: Expected drop of top-1 accuracy in points; None if there is no estimate.
        interval: Points between which the drops of nine in ten students lay, for networks that the
            law was not fitted to.
        reason: Why there is no estimate; empty if there is one.
    """

    source: str
    images: int
    relative_error: float | None
    agreement: float | None = None
    kl: float | None = None
    cosine: float | None = None
    decisions: float | None = None
    logit_error: float | None = None
    expected_drop: float | None = None
    interval: tuple[float, float] | None = None
    reason: str = ""

    def as_values(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Law:
    """The accuracy drop as a function of the error of the logits.

        d / (1 − d) = exp(shift) · x^power

    d is the drop of top-1 accuracy as a share, x the largest `logit_error` of all kinds of images.

    Attributes:
        shift: Logarithm of the odds of the drop at x = 1.
        power: Exponent of x.
        error: Error of log(1 + drop in points) in nine of ten cases. Small drops are known to
            about a point, large ones to a factor.
        limit: The largest x for which the law holds.
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
        """The interval around an expected drop, in points, clipped to 0..100."""
        low, high = ((1 + drop) * math.exp(sign * self.error) - 1 for sign in (-1, 1))
        return max(low, 0.0), min(high, 100.0)


LAW = Law(shift=-1.62, power=2.24, error=0.54, limit=0.6)
"""Fitted by `python -m benchmarks.trust` to the runs in benchmarks/results/trust.json."""


@dataclass(frozen=True)
class _LawSource(SpectralSource):
    """Images of mean 0 and standard deviation 1, with one contrast, for every network.

    The law was fitted on such images and holds for no others. All settings are written out here,
    so that a change of the defaults for recipes does not change them.
    """

    batch: int = 128
    iterations: int = 30
    optimizer: AdamConfig = AdamConfig(lr=0.05, betas=(0.8, 0.95))  # noqa: RUF009 (frozen)
    exponent: float = 1.5
    dc_power: float = 0.06
    channel_correlation: float = 0.85
    class_weight: float = 0.01
    focus: float = 2.0

    def input_statistics(self, teacher: Captured, seed: int) -> InputStatistics:  # noqa: ARG002 (the same for all)
        return InputStatistics.unit(teacher)


_OF_ATTENTION = operators.SOFTMAX | operators.PRODUCTS
_SOURCE = _LawSource()
_MAX_IMAGES, _MIN_IMAGES = 64, 32
"""Number of images that are made: the most, and the fewest however large the images are."""
_MAX_PIXELS = 64 * 64**2
"""Pixels of all images together, which limits the number of large images."""
_MIXTURES_PER_IMAGE = 4
_NOISE = "noise with the spectrum of natural images"
_MIN_POWER = 1e-12
_MAX_BATCH_IMAGES = 32
"""Largest batch; the memory budget can make it smaller."""


def measure_expected_drop(
    teacher: Captured,
    network: nn.Module,
    *,
    seed: int,
    listener: Listener = silent,
    memory: MemoryBudget = MemoryBudget(),
) -> DropEstimate:
    """Compare a student with its teacher on held-out images and estimate the accuracy drop.

    Args:
        teacher: The teacher.
        network: The student: maps [N, *input_shape] to what the teacher's graph returns, on the
            teacher's device.
        seed: The seed of the run. The images differ from those of every recipe with this seed.
        listener: Receives progress.
        memory: Limits the batch.
    """
    # A separate seed keeps these images apart from those that a recipe of the same seed makes.
    seed = random_stream(seed, "trust").initial_seed()

    def outputs(images: Tensor) -> Outputs:
        low, high = _input_range(network)
        return _outputs(teacher, network, images.clamp(low, high), listener, memory)

    reason = _why_not_validated(teacher)
    with in_full_float32(teacher.device):
        on_noise = outputs(noise_images(teacher, seed))
        if not teacher.batch_norms or len(teacher.input_shape) != 3:
            kind, first, second = _NOISE, on_noise, None
        else:
            kind = f"mixtures of synthetic images made for this test, and {_NOISE}"
            first, second = outputs(held_out_mixtures(teacher, seed, listener, memory)), on_noise
    return estimate_drop(
        *first,
        source=kind,
        is_classifier=teacher.classes is not None,
        reason=reason,
        on_noise=second,
        ends=teacher.ends,
    )


def estimate_drop(
    expected: Sequence[Tensor],
    actual: Sequence[Tensor],
    *,
    source: str,
    is_classifier: bool = True,
    reason: str = "",
    on_noise: Outputs | None = None,
    ends: Ends = NO_ENDS,
) -> DropEstimate:
    """Estimate the drop from the outputs of a teacher and its student on the same images.

    Args:
        expected: The teacher's outputs, each [N, ...].
        actual: The student's outputs.
        source: Where the images come from.
        is_classifier: Whether the first output is the logits of classes [N, C].
        reason: Why there can be no estimate; empty if there can be one.
        on_noise: Outputs of both on other images, which only count where they differ more.
        ends: What follows the outputs in the teacher.
    """
    pairs = [(expected, actual)] if on_noise is None else [(expected, actual), on_noise]
    found = [
        similarity
        for pair in pairs
        for similarity in compare_outputs(*pair, ends, is_classifier=is_classifier)
    ]
    estimate = DropEstimate(
        source,
        len(expected[0]),
        _largest([similarity.relative_error for similarity in found]),
        cosine=_smallest(similarity.cosine for similarity in found),
        decisions=_smallest(similarity.decisions for similarity in found),
        reason=reason,
    )
    if not is_classifier:
        return estimate
    agreement = (actual[0].argmax(1) == expected[0].argmax(1)).double().mean()
    kl = float(distillation_loss(actual[0], expected[0], 1.0, "batch"))
    x = logit_error(expected[0], actual[0], varied=True)
    if on_noise is not None:
        x = max(x, logit_error(on_noise[0][0], on_noise[1][0], classes=expected[0]))
    estimate = replace(
        estimate, agreement=100 * float(agreement), kl=_finite(kl), logit_error=_finite(100 * x)
    )
    if reason := reason or _why_out_of_range(expected[0], x):
        return replace(estimate, reason=reason)
    drop = LAW.drop(x)
    return replace(estimate, expected_drop=drop, interval=LAW.interval(drop))


def logit_error(
    expected: Tensor, actual: Tensor, *, varied: bool = False, classes: Tensor | None = None
) -> float:
    """Return the error of a student's logits that can change predictions, relative to its signal.

    With c(·), which subtracts from the logits of each image their mean, and the factor a >= 0 that
    brings the student nearest to its teacher:

        min_a ‖a c(ŷ) − c(y)‖ / ‖c(y)‖ · √(ln C / ln 10)

    A prediction changes when noise lifts any of the C logits above the highest one. The largest of
    C normal deviates grows as √(2 ln C), so the error is converted to that of ten classes. Classes
    that the teacher does not tell apart are one.

    Args:
        expected: The teacher's logits y [N, C].
        actual: The student's logits ŷ [N, C].
        varied: The images are of many classes, so that a class's mean over them is no signal: it is
            also subtracted from c(y) in the denominator. A class whose logit is always far below
            the others then counts as nothing.
        classes: Logits of the teacher [M, C] that tell classes apart; by default y.

    Returns:
        The error; infinity where outputs are not finite.
    """
    if not bool(actual.isfinite().all()):
        return math.inf
    chosen = distinct_classes(expected if classes is None else classes)
    teacher, student = (
        rows[:, chosen] - rows[:, chosen].mean(1, keepdim=True)
        for rows in (expected.double(), actual.double())
    )
    factor = (teacher * student).sum() / student.square().sum().clamp_min(_MIN_POWER)
    error = (factor.clamp_min(0) * student - teacher).norm()
    signal = (teacher - teacher.mean(0) if varied else teacher).norm()
    converted = math.sqrt(math.log(max(len(chosen), 2)) / math.log(10))
    return float(error / signal.clamp_min(_MIN_POWER)) * converted


def distinct_classes(logits: Tensor) -> list[int]:
    """Return one class of each group whose logits [N, C] are equal for all images, in order."""
    groups = logits.unique(dim=1, return_inverse=True)[1].tolist()
    return [index for index, group in enumerate(groups) if groups.index(group) == index]


def _input_range(network: nn.Module) -> tuple[float, float]:
    """Return the range of a student's input: it clips values that no pixel has."""
    known = network.input_range if isinstance(network, IntegerNetwork) else None
    return UNLIMITED if known is None else known


def noise_images(teacher: Captured, seed: int) -> Tensor:
    """Make noise with the spectrum of natural images [N, *input_shape]."""
    draw = random_stream(seed, "trust.noise")
    images = natural_noise(_MAX_IMAGES, teacher.input_shape, _SOURCE, draw)
    return images.to(teacher.device)


def drop_work(teacher: Captured) -> Work:
    """Return how much work `measure_expected_drop` is."""
    if not teacher.batch_norms or len(teacher.input_shape) != 3:
        return Work(_MAX_IMAGES, _MAX_IMAGES)
    made = _images_made(teacher)
    compared = _MIXTURES_PER_IMAGE * made + _MAX_IMAGES
    return Work(compared, compared, _SOURCE.iterations * made)


def _images_made(teacher: Captured) -> int:
    fitting = _MAX_PIXELS // math.prod(teacher.input_shape[1:])
    return max(_MIN_IMAGES, min(_MAX_IMAGES, fitting))


def make_images(
    teacher: Captured,
    seed: int,
    listener: Listener = silent,
    memory: MemoryBudget = MemoryBudget(),
) -> Tensor:
    """Make the spectral images [N, *input_shape] that are mixed.

    Args:
        teacher: The trained network.
        seed: Seed of the images.
        listener: Receives the steps of making them.
        memory: Budget for the images that pass together.

    Raises:
        UsageError: The source cannot make images for this network.
    """
    count = _images_made(teacher)
    context = Context(seed=seed, listener=listener, memory=memory)
    images, _ = collect(replace(_SOURCE, batch=count), teacher, count, context=context)
    return images


def held_out_mixtures(
    teacher: Captured,
    seed: int,
    listener: Listener = silent,
    memory: MemoryBudget = MemoryBudget(),
) -> Tensor:
    """Make images and mix them: [N, *input_shape].

    Args:
        teacher: The trained network.
        seed: Seed of the run.
        listener: Receives the steps of making the images.
        memory: Budget for the images that pass together.

    Raises:
        UsageError: The source cannot make images for this network.
    """
    images = make_images(teacher, seed, listener, memory)
    return mix_images(
        images, _MIXTURES_PER_IMAGE * len(images), random_stream(seed, "trust.mixtures")
    )


def mix_images(images: Tensor, count: int, draw: torch.Generator) -> Tensor:
    """Mixtures λ a + (1 − λ) b [count, ...] of random pairs of images, with random λ in 0.5..1.

    Args:
        images: [N, ...].
        count: Number of mixtures.
        draw: Randomness of the pairs and of λ.
    """
    first, second = (torch.randint(len(images), (count,), generator=draw) for _ in range(2))
    share = 0.5 + 0.5 * torch.rand(count, generator=draw)
    share = share.to(images.device).view(-1, *([1] * (images.ndim - 1)))
    return share * images[first] + (1 - share) * images[second]


@torch.no_grad()
def _outputs(
    teacher: Captured,
    student: nn.Module,
    images: Tensor,
    listener: Listener,
    memory: MemoryBudget,
) -> tuple[list[Tensor], list[Tensor]]:
    """All outputs [N, ...] of the teacher and of the student, on the CPU."""
    parts = images.split(
        min(_MAX_BATCH_IMAGES, forward_images(teacher.network.graph, memory, images.device))
    )
    found = []
    for step, part in enumerate(parts, start=1):
        found.append([in_order(network(part)) for network in (teacher.network, student)])
        listener(Step("trust", step, len(parts), {}))
    expected, actual = (
        [torch.cat(tensors).cpu() for tensors in zip(*outputs, strict=True)]
        for outputs in zip(*found, strict=True)
    )
    return expected, actual


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _largest(values: Sequence[float]) -> float | None:
    """The largest number; None if any is not finite."""
    return max(values) if all(map(math.isfinite, values)) else None


def _smallest(values: Iterable[float | None]) -> float | None:
    """The smallest number; None if there is none, or any is not finite."""
    numbers = [value for value in values if value is not None]
    return min(numbers) if numbers and all(map(math.isfinite, numbers)) else None


def _why_not_validated(teacher: Captured) -> str:
    """Why the law was not validated for this teacher; empty if it was."""
    if teacher.ends.kind == "unit_norm" and teacher.classes is None:
        return (
            "Only classifiers have an accuracy; the outputs of this network are unit vectors "
            "(embeddings). What counts is their cosine."
        )
    if teacher.ends.kind == "sigmoid" and teacher.classes is None:
        return (
            "Only classifiers have a top-1 accuracy; this network ends in a sigmoid, so its "
            "outputs are independent decisions. What counts is how many of them are the same."
        )
    if teacher.classes is None:
        return "Only classifiers have an accuracy; the outputs of this network are not classes."
    if not teacher.batch_norms or len(teacher.input_shape) != 3:
        return (
            "The estimate was validated on networks with batch norms that take images; this "
            "network is different. Measure it on real inputs (--test)."
        )
    if any(operators.name_of(n) in _OF_ATTENTION for n in teacher.network.graph.nodes):
        return (
            "The estimate was validated on convolutional networks; this network has attention "
            "(a softmax or products of activations inside). Measure it on real images (--test)."
        )
    return ""


def _why_out_of_range(expected: Tensor, x: float) -> str:
    """Why the teacher's logits [N, C] or the error x allow no estimate; empty if they do."""
    if not math.isfinite(x):
        return "The student's outputs are not finite."
    if len(expected.argmax(1).unique()) < 2:
        return (
            "The teacher predicts the same class for all held-out images, so they do not "
            "represent its inputs. Measure the accuracy on real images (--test)."
        )
    if x > LAW.limit:
        return (
            f"The error of the student's logits is {x:.0%} (converted to ten classes). "
            f"Above {LAW.limit:.0%} all measured drops were large, but too scattered to estimate."
        )
    return ""
