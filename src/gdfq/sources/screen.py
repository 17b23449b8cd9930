"""The screen: which candidates help a network, without a threshold that depends on the network.

Candidates are compared with two pools that every run has: the images that the run makes or is
given, and noise.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gdfq.errors import GdfqWarning, UsageError
from gdfq.execution.context import Context
from gdfq.execution.distributed import Statistics
from gdfq.execution.progress import Step
from gdfq.execution.seeding import stream as random_stream
from gdfq.functional.losses import patch_entropies, relative_statistics_loss
from gdfq.functional.screening import (
    ImageStatistics,
    batch_norm_sensitivity,
    energy,
    image_moments,
    joint_moments,
)
from gdfq.graph import queries
from gdfq.graph.batch_norms import batch_norm_of
from gdfq.graph.blocks import with_features
from gdfq.graph.capture import Captured
from gdfq.graph.memory import forward_images
from gdfq.sources.candidates import (
    ENERGY,
    ENTROPY,
    KEPT,
    SENSITIVITY,
    UNREADABLE,
    VERDICTS,
    Candidates,
    Screen,
    Screening,
)
from gdfq.sources.noise import noise_like_inputs
from gdfq.sources.patches import patch_nodes, patches

_SAMPLE_IMAGES = 128
"""Images of each pool whose joint statistics are compared. Few images have worse statistics, so all
pools are compared on the same number."""
_REFERENCE_IMAGES = 256
"""Images of the run whose scores are compared with those of candidates."""
_GROUP_IMAGES, _MAX_GROUP_BYTES = 1024, 2**28
"""Candidates that are judged together, and maximum bytes of their statistics."""
_FORWARD_IMAGES = 32
"""Images that pass the network together; more are not faster."""
_UNREADABLE = VERDICTS.index(UNREADABLE)


class Judge:
    """The scores that a network gives to images.

    Attributes:
        teacher: The network.
        stored: Stored statistics of its batch norms.
        group_images: Candidates whose statistics are held at the same time.

    Raises:
        UsageError: The network has neither classes nor batch norms nor patches.
    """

    def __init__(self, teacher: Captured, screen: Screen, context: Context) -> None:
        graph = teacher.network.graph
        self.teacher, self._screen = teacher, screen
        self.stored: Statistics = [
            (norm.mean, norm.variance)
            for norm in (batch_norm_of(teacher, node) for node in teacher.batch_norms)
        ]
        self._patches = [] if self.stored else patch_nodes(graph)
        if teacher.classes is None and not self.stored and not self._patches:
            raise UsageError(
                "candidates are judged by classes, batch norms or patches; this network has none. "
                "Remove the proxy images, or give images that suit it as data."
            )
        observed = [queries.input_of(node) for node in teacher.batch_norms] or self._patches
        self._network = with_features(teacher.network, observed)
        self._at_once = min(
            _FORWARD_IMAGES, forward_images(self._network.graph, context.memory, teacher.device)
        )
        values = sum(2 * len(mean) for mean, _ in self.stored)
        room = _MAX_GROUP_BYTES // (4 * values) if values else _GROUP_IMAGES
        self.group_images = max(_FORWARD_IMAGES, min(_GROUP_IMAGES, room))

    @torch.no_grad()
    def observe(self, images: Tensor) -> "Observed":
        """Pass images [N, *input_shape] through the network, once."""
        return Observed.joined([self._observe(part) for part in images.split(self._at_once)])

    def _observe(self, images: Tensor) -> "Observed":
        outputs, features = self._network(images)
        energies = predictions = None
        if self.teacher.classes is not None:
            energies = energy(outputs, self._screen.temperature)
            predictions = outputs.argmax(1)
        if self.stored:
            return Observed(energies, predictions, [image_moments(f) for f in features], None)
        entropies = None
        if self._patches:
            by_node = [
                patch_entropies(patches(node, feature)).view(len(images), -1).mean(1)
                for node, feature in zip(self._patches, features, strict=True)
            ]
            entropies = torch.stack(by_node).mean(0)
        return Observed(energies, predictions, [], entropies)

    def distance(self, images: Tensor) -> Tensor:
        """Return the batch-norm distance of images [N, *input_shape], by which ZeroP ranks pools.

        It is `relative_statistics_loss` of the statistics of all images together, a scalar.
        """
        joint = [joint_moments(*moments) for moments in self.observe(images).moments]
        return relative_statistics_loss(joint, self.stored)


@dataclass(frozen=True, eq=False)
class Observed:
    """What a network computes for images.

    Attributes:
        energies: [N]; None without classes.
        predictions: [N]; None without classes.
        moments: Of each image, for each batch norm.
        entropies: Of patch similarity, [N]; None with batch norms.
    """

    energies: Tensor | None
    predictions: Tensor | None
    moments: ImageStatistics
    entropies: Tensor | None

    @classmethod
    def joined(cls, parts: Sequence["Observed"]) -> "Observed":
        """Return the parts as one."""

        def cat(tensors: Sequence[Tensor | None]) -> Tensor | None:
            found = [tensor for tensor in tensors if tensor is not None]
            return torch.cat(found) if found else None

        norms = zip(*(part.moments for part in parts), strict=True)
        moments = [
            (torch.cat([mean for mean, _ in norm]), torch.cat([variance for _, variance in norm]))
            for norm in norms
        ]
        return cls(
            cat([part.energies for part in parts]),
            cat([part.predictions for part in parts]),
            moments,
            cat([part.entropies for part in parts]),
        )

    @property
    def count(self) -> int:
        """Number of images."""
        found = (self.energies, self.entropies, *(mean for mean, _ in self.moments))
        return next(len(tensor) for tensor in found if tensor is not None)

    def at(self, places: Tensor) -> "Observed":
        """Return what was observed for the images at some places."""

        def rows(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[places]

        moments = [(mean[places], variance[places]) for mean, variance in self.moments]
        return Observed(rows(self.energies), rows(self.predictions), moments, rows(self.entropies))


@dataclass(frozen=True)
class _Limits:
    """What the scores of candidates are compared with.

    Attributes:
        max_energy: Highest energy; None without classes.
        min_entropy: Lowest entropy of patch similarity; None with batch norms.
    """

    max_energy: float | None
    min_entropy: float | None


def screened(
    teacher: Captured, own: Tensor, candidates: Candidates, count: int, context: Context
) -> tuple[Screening, Tensor, Tensor | None]:
    """Judge candidates until `count` of them are kept.

    Files that cannot be decoded are left out, with a warning.

    Args:
        teacher: The trained network.
        own: The images that the run makes or is given, [N, *input_shape].
        candidates: The candidates.
        count: Maximum number of candidates that are kept.
        context: Context of the run. The processes of a group keep the same candidates.

    Returns:
        What was found; the images that are kept, [n, *input_shape]; and their labels [n], the
        teacher's predictions, for a network with classes.

    Raises:
        UsageError: The network cannot judge images.
    """
    screen = candidates.screen
    judge = Judge(teacher, screen, context)
    order = torch.randperm(len(candidates), generator=random_stream(context.seed, "screen.order"))
    limits = _limits(judge, own, screen, context)
    images, labels = [own[:0]], [own.new_empty(0).long()]
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    needed, damaged = count, dict[int, str]()
    for chosen in order.split(judge.group_images):
        group, broken = candidates.readable(chosen, teacher.device)
        damaged |= {int(chosen[place]): what for place, what in broken.items()}
        observed = judge.observe(group)
        verdict, score = _judged(observed, limits, judge, screen, list(broken))
        verdict = context.group.broadcast(0, verdict)
        kept = (verdict == VERDICTS.index(KEPT)).nonzero().flatten()
        judged = len(chosen)
        if len(kept) >= needed:  # what follows is not needed
            kept, judged = kept[:needed], int(kept[needed - 1]) + 1
        images.append(group[kept])
        if observed.predictions is not None:
            labels.append(context.group.broadcast(0, observed.predictions[kept]))
        energies = score[:0]
        if observed.energies is not None:
            energies = observed.energies.masked_fill(verdict == _UNREADABLE, math.nan)
        parts.append((verdict[:judged].cpu(), energies[:judged].cpu(), score[:judged].cpu()))
        context.listener(Step("screen", sum(len(part[0]) for part in parts), len(order), {}))
        needed -= len(kept)
        if not needed:
            break
    verdicts, energies, scores = map(torch.cat, zip(*parts, strict=True))
    used, predictions = torch.cat(images), torch.cat(labels)
    readable = order[: len(verdicts)][verdicts != _UNREADABLE]
    distances = _distances(judge, own, candidates, readable, used, context)
    refused = _refusal(screen, len(used), len(readable), distances)
    if refused is not None:
        used, predictions = used[:0], predictions[:0]
    screening = Screening(
        kind=candidates.kind,
        candidates=len(candidates),
        judged=order[: len(verdicts)],
        verdicts=verdicts,
        energies=energies,
        scores=scores,
        own=len(own),
        max_energy=limits.max_energy,
        min_entropy=limits.min_entropy,
        distances=distances,
        refused=refused,
    )
    _warn_of_unreadable(screening, damaged)
    return screening, used, None if teacher.classes is None else predictions


def _warn_of_unreadable(screening: Screening, damaged: Mapping[int, str]) -> None:
    """Warn of files that were left out; `damaged` has what is wrong with each, by its index."""
    places = screening.of(UNREADABLE)
    if len(places):
        first = int(screening.judged[places[0]])
        warnings.warn(
            f"of {len(screening.judged)} {screening.kind} images that were judged {len(places)} "
            f"cannot be decoded and are left out, such as {damaged.get(first, f'image {first}')}. "
            "Repair or remove them when the run has finished: a stopped run resumes with the same "
            "images alone.",
            GdfqWarning,
            stacklevel=3,
        )


def _limits(judge: Judge, own: Tensor, screen: Screen, context: Context) -> _Limits:
    """Return what scores are compared with, the same in all processes."""
    observed = judge.observe(_spaced(own, _REFERENCE_IMAGES))
    max_energy = min_entropy = None
    if observed.energies is not None:
        max_energy = _agreed(observed.energies.quantile(screen.known_share), context)
    if observed.entropies is not None:
        noise = noise_like_inputs(_SAMPLE_IMAGES, judge.teacher)["natural"]
        entropies = judge.observe(noise).entropies
        assert entropies is not None
        min_entropy = _agreed(entropies.median(), context)
    return _Limits(max_energy, min_entropy)


def _distances(
    judge: Judge,
    own: Tensor,
    candidates: Candidates,
    readable: Tensor,
    used: Tensor,
    context: Context,
) -> dict[str, float]:
    """Return the batch-norm distance of each pool; empty without batch norms or candidates."""
    if not judge.stored or not len(readable):
        return {}
    count = min(_SAMPLE_IMAGES, len(used) or len(readable))
    pools = {
        "noise": noise_like_inputs(count, judge.teacher)["natural"],
        "own": _spaced(own, count),
        "candidates": candidates.images(readable[:count], own.device),
        "kept": used[:count],
    }
    return {
        name: _agreed(judge.distance(images), context)
        for name, images in pools.items()
        if len(images)
    }


def _refusal(screen: Screen, kept: int, judged: int, distances: dict[str, float]) -> str | None:
    """Return why a pool, of whose readable images so many were judged, is unsuitable, or None."""
    if not judged:
        return "none of them can be decoded"
    if not screen.filters:
        return None
    if not kept or kept < screen.least_share * judged:
        return (
            f"the network knows only {kept} of the {judged} images that were judged, so they are "
            "too far from what it was trained on"
        )
    if distances and 2 * distances["kept"] >= distances["own"] + distances["noise"]:
        return (
            f"the batch-norm distance of those that passed the filters, {distances['kept']:.3f}, "
            f"is nearer to that of noise, {distances['noise']:.3f}, than to that of the run's own "
            f"images, {distances['own']:.3f}, so they would harm the network"
        )
    return None


def _spaced(images: Tensor, count: int) -> Tensor:
    """Return at most `count` images, evenly spaced, because images made together are similar."""
    places = torch.linspace(0, len(images) - 1, min(count, len(images))).round().long()
    return images[places.to(images.device)]


def _agreed(number: Tensor, context: Context) -> float:
    """Return the number that the first process has."""
    return float(context.group.broadcast(0, number))


def _judged(
    observed: Observed, limits: _Limits, judge: Judge, screen: Screen, unreadable: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return the verdict on each image of a group, [N], and its sensitivity or entropy, [N].

    Images at the places `unreadable` stand for files that cannot be decoded.
    """
    count = observed.count
    verdict = torch.zeros(count, dtype=torch.long, device=judge.teacher.device)
    verdict[torch.tensor(unreadable, dtype=torch.long, device=verdict.device)] = _UNREADABLE
    score = torch.full((count,), math.nan, device=verdict.device)
    if not screen.filters:
        return verdict, score
    if observed.energies is not None and limits.max_energy is not None:
        unknown = (observed.energies > limits.max_energy) & (verdict == 0)
        verdict[unknown] = VERDICTS.index(ENERGY)
    rest = (verdict == 0).nonzero().flatten()
    if judge.stored and len(rest) > 1:
        score[rest] = batch_norm_sensitivity(observed.at(rest).moments, judge.stored)
        verdict[score > 0] = VERDICTS.index(SENSITIVITY)
    elif observed.entropies is not None and limits.min_entropy is not None:
        score[rest] = observed.entropies[rest]
        verdict[score < limits.min_entropy] = VERDICTS.index(ENTROPY)
    return verdict, score
