"""Preprocessing: how pixels become the normalised inputs of a network, and back."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from gdfq.errors import UsageError
from gdfq.files.plain_values import tagged
from gdfq.files.untrusted import RESIZED, check_pixels

if TYPE_CHECKING:
    from PIL.Image import Image

_FILTERS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")


@tagged("Resize")
@dataclass(frozen=True)
class Resize:
    """How an image file gets the network's size: it is resized, then cropped at the centre.

    crop: the share of the resized image's sides that is kept: 0.875 resizes to 256 for 224.
    squash: both sides are resized to that, whatever the image's shape; without, the image keeps
        its shape and covers it.
    interpolation: one of pillow's filters (antialiased).
    """

    crop: float = 1.0
    squash: bool = False
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        if not 0 < self.crop <= 1:
            raise UsageError(f"crop must lie in 0..1 and not be 0; got {self.crop}.")
        if self.interpolation not in _FILTERS:
            raise UsageError(
                f"interpolation must be one of {', '.join(_FILTERS)}; got {self.interpolation!r}."
            )

    def __call__(self, image: "Image", size: tuple[int, int]) -> "Image":
        """The image in the given size (width, height).

        Raises ValueError when it is so long and thin that it could not be held in memory.
        """
        from PIL.Image import Resampling

        # 224 / (224 / 232) is a little less than 232.
        target = tuple(math.floor(side / self.crop + 1e-6) for side in size)
        if not self.squash:
            scale = max(side / was for side, was in zip(target, image.size, strict=True))
            target = tuple(
                max(side, int(was * scale + 1e-6))
                for side, was in zip(target, image.size, strict=True)
            )
        check_pixels(target[0], target[1], RESIZED)
        image = image.resize((target[0], target[1]), Resampling[self.interpolation.upper()])
        left, top = (round((was - side) / 2) for was, side in zip(target, size, strict=True))
        return image.crop((left, top, left + size[0], top + size[1]))


@tagged("Preprocessing")
@dataclass(frozen=True)
class Preprocessing:
    """(pixel / 255 − mean) / std, per channel; image files are resized before."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: Resize = Resize()

    @classmethod
    def of(
        cls,
        channels: int,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        resize: Resize | None = None,
    ) -> "Preprocessing":
        """Mean 0 and std 1 where they are not given.

        Raises UsageError when their lengths are not `channels` or a std is not positive.
        """
        mean, std = tuple(mean or (0.0,) * channels), tuple(std or (1.0,) * channels)
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != channels:
                raise UsageError(
                    f"{name} needs one value for each of the {channels} input channels; "
                    f"got {len(values)}: {', '.join(map(str, values))}."
                )
            if not np.isfinite(values).all():
                raise UsageError(f"{name} must be finite; got {', '.join(map(str, values))}.")
        if min(std) <= 0:
            raise UsageError(f"std must be positive; got {', '.join(map(str, std))}.")
        return cls(mean, std, resize or Resize())

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 pixels [N, C, *] become normalised floats; floats are taken as normalised."""
        if not images.is_floating_point():
            shape = (1, -1, *([1] * (images.ndim - 2)))
            mean, std = (torch.tensor(v).view(shape) for v in (self.mean, self.std))
            images = (images.float() / 255 - mean) / std
        images = images.float()
        layout = torch.channels_last if images.ndim == 4 else torch.contiguous_format
        return images.contiguous(memory_format=layout)

    def pixels(self, images: Tensor) -> Tensor:
        """The inverse: normalised floats become uint8 pixels, clipped to 0..255."""
        shape = (1, -1, *([1] * (images.ndim - 2)))
        mean, std = (torch.tensor(v).view(shape) for v in (self.mean, self.std))
        return ((images.cpu() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)

    def to_npz(self, images: Tensor, **more: Tensor) -> bytes:
        """Normalised images as pixels in an .npz file, as `load_data` reads it, and more arrays."""
        buffer = io.BytesIO()
        arrays: dict[str, Any] = {"images": self.pixels(images).numpy()}
        arrays |= {name: tensor.numpy() for name, tensor in more.items()}
        np.savez_compressed(buffer, **arrays)
        return buffer.getvalue()
