"""Augmentation of images, and whether a network's predictions are consistent under it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gdfq.graph.capture import Captured

_MAX_IMAGES = 256
"""Images whose prediction is compared with that of the augmented image."""
_IMAGES_PER_DRAW = 4
"""Images that share one random shift and flip."""
CONSISTENT_SHARE = 0.5
"""Minimum consistency of a network that was trained on augmented images. Measured: 0.67 to 0.83 for
two networks that were, 0.36 to 0.43 for one that was not."""


def spread(count: int) -> Tensor:
    """Return indices of at most 256 of `count` images, evenly spaced: neighbours are similar."""
    return torch.linspace(0, count - 1, min(_MAX_IMAGES, count)).round().long()


@torch.no_grad()
def prediction_consistency(teacher: Captured, images: Tensor, draw: torch.Generator) -> Tensor:
    """Return the share of images whose predicted class is the same after a shift and a flip.

    Args:
        teacher: The trained network.
        images: Normalised images [N, *input_shape].
        draw: Randomness of the augmentation.

    Returns:
        A scalar in 0..1; 1 for a teacher whose outputs are not classes.
    """
    if teacher.classes is None:
        return torch.ones((), device=teacher.device)

    def classes(images: Tensor) -> Tensor:
        predicted: Tensor = teacher.network(images).argmax(1)
        return predicted

    parts = images.split(_IMAGES_PER_DRAW)
    same = [classes(part) == classes(shifted_and_flipped(part, draw)) for part in parts]
    return torch.cat(same).float().mean()


def shifted_and_flipped(images: Tensor, draw: torch.Generator) -> Tensor:
    """Return the images with a `random_move`."""
    return moved(images, random_move(images, draw))


@dataclass(frozen=True)
class Move:
    """A shift with mirrored borders, and a horizontal flip after it.

    Attributes:
        offsets: Of each side in pixels, from 0 to twice an eighth of the side; an eighth leaves the
            images where they are.
        flips: Whether the images are flipped.
    """

    offsets: Sequence[int]
    flips: bool


def random_move(images: Tensor, draw: torch.Generator) -> Move:
    """Return a random shift by up to an eighth of each side.

    Two-dimensional images are also flipped horizontally with probability 1/2.

    Args:
        images: [N, C, *size].
        draw: Randomness of the offsets and of the flip.
    """
    size = images.shape[2:]
    offsets = [int(torch.randint(2 * (side // 8) + 1, (1,), generator=draw)) for side in size]
    return Move(offsets, len(size) == 2 and bool(torch.randint(2, (1,), generator=draw)))


def moved(images: Tensor, move: Move) -> Tensor:
    """Return images [N, C, *size] shifted and flipped, all in the same way."""
    size = images.shape[2:]
    reach = [side // 8 for side in size]
    if any(reach):
        padding = [r for r in reversed(reach) for _ in range(2)]
        images = F.pad(images, padding, mode="reflect")
        for dim, (offset, side) in enumerate(zip(move.offsets, size, strict=True), start=2):
            images = images.narrow(dim, offset, side)
    if move.flips:
        images = images.flip(-1)
    layout = torch.channels_last if images.ndim == 4 else torch.contiguous_format
    return images.contiguous(memory_format=layout)
