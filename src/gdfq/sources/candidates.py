"""Candidates: images that nobody selected for a network, and what a screen found of them.

Photographs from elsewhere (proxies) and images of a text-to-image model are the same here.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gdfq.data.datasets import ImageData, readable_images
from gdfq.data.preprocessing import Preprocessing
from gdfq.files.plain_values import tagged

KEPT, ENERGY, SENSITIVITY, ENTROPY = "kept", "energy", "sensitivity", "entropy"
UNREADABLE = "unreadable"
FILTERS = (ENERGY, SENSITIVITY, ENTROPY)
VERDICTS = (KEPT, *FILTERS, UNREADABLE)
"""What happened to a candidate: it was kept, a filter dropped it, or its file is damaged.

Checkpoints hold places in this list."""
_REASONS = {
    ENERGY: "are unlike what the network knows (energy)",
    SENSITIVITY: "worsen the match of the batch-norm statistics (sensitivity)",
    ENTROPY: "have less structure than noise (entropy)",
    UNREADABLE: "cannot be decoded (unreadable)",
}
"""Of each verdict that drops images, what is wrong with them."""


@tagged("Screen")
@dataclass(frozen=True)
class Screen:
    """Rules that decide which candidates are kept.

    Candidates are judged in a random order until enough are kept. One is dropped, in this order,

    - if its energy is above that of the share `known_share` of the run's own images,
    - if its batch-norm sensitivity is positive: the others match the network's statistics better
      without it,
    - in a network without batch norms, if its entropy of patch similarity is below that of most
      noise images.

    The whole pool is unsuitable if fewer than `least_share` of the judged images pass, or if the
    batch-norm distance of those that pass is nearer to that of 1/f noise than to that of the run's
    own images. (Pools that helped had 0.09 to 0.27 of the distance of noise, one that harmed 0.65:
    docs/proxies.md.)

    Attributes:
        temperature: T of the energy.
        known_share: Share of the run's own images that a candidate's energy is compared with.
        least_share: Smallest share of a suitable pool that is kept.
        filters: Whether images are filtered at all; if not, all pools are suitable.
    """

    temperature: float = 1.0
    known_share: float = 0.95
    least_share: float = 0.05
    filters: bool = True


@dataclass(frozen=True, eq=False)
class Candidates:
    """A pool of images that nobody selected for the network.

    Attributes:
        data: The images. Labels are not used: the teacher's own predictions are the labels.
        preprocessing: From pixels to the input space of the network.
        kind: What they are, for the user: "proxy" or "generated".
        screen: Rules that decide which are kept.
    """

    data: ImageData
    preprocessing: Preprocessing
    kind: str = "proxy"
    screen: Screen = field(default_factory=Screen)

    def __len__(self) -> int:
        return len(self.data)

    def images(self, chosen: Tensor, device: torch.device) -> Tensor:
        """Return normalised images of the given indices, [N, *input_shape]."""
        return self.preprocessing(self.data.images(chosen)).to(device)

    def readable(self, chosen: Tensor, device: torch.device) -> tuple[Tensor, dict[int, str]]:
        """Return normalised images of the given indices, and those of them that are damaged.

        Returns:
            As `images`, black where a file cannot be decoded; and for each of these its place in
            `chosen`, its name and what is wrong with it.
        """
        images, damaged = readable_images(self.data, chosen)
        return self.preprocessing(images).to(device), damaged


@dataclass(frozen=True, eq=False)
class Screening:
    """What the screen found.

    Attributes:
        kind: What the candidates are.
        candidates: Number of candidates.
        judged: Indices of those that were judged, in their order, [n].
        verdicts: Of each, its place in `VERDICTS`, [n].
        energies: Of each, [n]; NaN where it is unreadable; empty for a network without classes.
        scores: Sensitivity of each or, without batch norms, entropy, [n]; NaN where an image was
            dropped before; empty if the network has neither.
        own: Number of images that the run makes or is given.
        max_energy: Highest energy of a candidate that is kept; None without classes.
        min_entropy: Lowest entropy of a candidate that is kept; None with batch norms.
        distances: Batch-norm distance of up to 128 images of each pool: "noise", "own",
            "candidates", "kept"; empty without batch norms.
        refused: Why no candidate is used; None if some are.
    """

    kind: str
    candidates: int
    judged: Tensor
    verdicts: Tensor
    energies: Tensor
    scores: Tensor
    own: int
    max_energy: float | None
    min_entropy: float | None
    distances: dict[str, float]
    refused: str | None

    @property
    def kept(self) -> Tensor:
        """Indices of the candidates that are used."""
        chosen: Tensor = self.judged[self.verdicts == VERDICTS.index(KEPT)]
        return chosen[:0] if self.refused else chosen

    def of(self, verdict: str) -> Tensor:
        """Return the places in `judged` of the candidates with a verdict."""
        return (self.verdicts == VERDICTS.index(verdict)).nonzero().flatten()

    def as_values(self) -> dict[str, Any]:
        """Return plain values for the metrics of a run."""
        used = len(self.kept)
        return {
            "kind": self.kind,
            "candidates": self.candidates,
            "judged": len(self.judged),
            "kept": used,
            "dropped": {name: len(self.of(name)) for name in VERDICTS[1:] if len(self.of(name))},
            "own": self.own,
            "share": round(used / (used + self.own), 4),
            "max_energy": self.max_energy,
            "min_entropy": self.min_entropy,
            "distances": self.distances,
            "refused": self.refused,
        }

    def __str__(self) -> str:
        """Return what was used and why the rest was not, for people."""
        noun = f"{self.candidates} {self.kind} images"
        if self.refused:
            return f"none of the {noun} is used: {self.refused}"
        used, judged = len(self.kept), len(self.judged)
        passed = f"of {noun} {judged} were judged, until {used} had passed"
        if judged == self.candidates:
            passed = f"of {noun}, which were all judged, {used} passed"
        counts = {name: len(self.of(name)) for name in _REASONS}
        because = [f"{n} because they {_REASONS[name]}" for name, n in counts.items() if n]
        dropped = f"; dropped were {' and '.join(because)}" if because else ""
        share = 100 * self.as_values()["share"]
        return f"{passed}{dropped}. {share:.0f} % of the images for tuning are of these"
