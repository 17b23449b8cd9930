"""Preprocessing: from pixels to the normalised inputs of a network, and back."""

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
from gdfq.files.untrusted import MAX_RESIZED_PIXELS, check_pixels

if TYPE_CHECKING:
    from PIL.Image import Image

_FILTERS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")

PerChannel = float | Sequence[float] | np.ndarray[Any, Any] | Tensor
"""One number for each channel, or one number for all of them."""


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
        check_pixels(target[0], target[1], MAX_RESIZED_PIXELS)
        image = image.resize((target[0], target[1]), Resampling[self.interpolation.upper()])
        left, top = (round((was - side) / 2) for was, side in zip(target, size, strict=True))
        return image.crop((left, top, left + size[0], top + size[1]))


@tagged("Preprocessing")
@dataclass(frozen=True)
class Preprocessing:
    """(pixel / 255 − mean) / std, per channel; image files are resized first."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: Resize = Resize()

    @classmethod
    def of(
        cls,
        channels: int,
        mean: PerChannel | None,
        std: PerChannel | None,
        resize: Resize | None = None,
    ) -> "Preprocessing":
        """Return the preprocessing of a network with `channels` input channels.

        Args:
            channels: Input channels of the network.
            mean: Of pixels in 0..1, for each channel or for all of them; 0 if it is not given.
            std: Of pixels in 0..1, for each channel or for all of them; 1 if it is not given.
            resize: How image files get the network's size.

        Raises:
            UsageError: They are no numbers, do not fit the channels, or are for pixels in 0..255.
        """
        means, stds = normalisation(mean, std)
        return cls(
            _each_channel("mean", mean, means or (0.0,), channels),
            _each_channel("std", std, stds or (1.0,), channels),
            resize or Resize(),
        )

    def __call__(self, images: Tensor) -> Tensor:
        """Return normalised floats for uint8 pixels [N, C, *]; floats count as normalised."""
        if not images.is_floating_point():
            shape = (1, -1, *([1] * (images.ndim - 2)))
            mean, std = (torch.tensor(v).view(shape) for v in (self.mean, self.std))
            images = (images.float() / 255 - mean) / std
        images = images.float()
        layout = torch.channels_last if images.ndim == 4 else torch.contiguous_format
        return images.contiguous(memory_format=layout)

    @property
    def limits(self) -> tuple[tuple[float, float], ...]:
        """The inputs of black and white pixels, for each channel."""
        return tuple((-m / s, (1 - m) / s) for m, s in zip(self.mean, self.std, strict=True))

    def pixels(self, images: Tensor) -> Tensor:
        """Return uint8 pixels, clipped to 0..255, for normalised floats: the inverse."""
        shape = (1, -1, *([1] * (images.ndim - 2)))
        mean, std = (torch.tensor(v).view(shape) for v in (self.mean, self.std))
        return ((images.cpu() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)

    def to_npz(self, images: Tensor, **more: Tensor) -> bytes:
        """Return normalised images as an .npz file of pixels that `load_data` reads.

        Args:
            images: Normalised images, [N, C, *].
            more: Further arrays of the file, by name.
        """
        buffer = io.BytesIO()
        arrays: dict[str, Any] = {"images": self.pixels(images).numpy()}
        arrays |= {name: tensor.numpy() for name, tensor in more.items()}
        np.savez_compressed(buffer, **arrays)
        return buffer.getvalue()


def normalisation(
    mean: PerChannel | None, std: PerChannel | None
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Return mean and std as plain numbers, one or one for each channel; None stays None.

    Raises:
        UsageError: They are no finite numbers, a std is not positive, or they are for pixels in
            0..255: pixels in 0..1 have no mean and no standard deviation above 1.
    """
    found = _numbers("mean", mean), _numbers("std", std)
    if found[1] is not None and min(found[1]) <= 0:
        raise UsageError(
            f"std must be positive; got {_listed(found[1])}. Give the standard deviation of each "
            "channel, for pixels in 0..1."
        )
    if any(values is not None and max(map(abs, values)) > 1 for values in found):
        _refuse_bytes(*found)
    return found


def _numbers(name: str, given: PerChannel | None) -> tuple[float, ...] | None:
    """Return numbers in any of their usual forms as a tuple of floats."""
    if given is None:
        return None
    try:
        if isinstance(given, str | bytes):
            raise ValueError("it is text")
        if isinstance(given, Tensor):
            given = given.detach().cpu().numpy()
        array = np.asarray(given)
        if array.dtype.kind not in "iuf":
            raise ValueError("it holds other values")
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"{name} must be one number for each input channel, or one number for all; "
            f"got {given!r}. Give it as (0.485, 0.456, 0.406)."
        ) from error
    # A buffer of a module has the shape [C, 1, 1] or [1, C, 1, 1].
    if not array.size or array.size != max(array.shape, default=1):
        raise UsageError(
            f"{name} must be one number for each input channel, or one number for all; got an "
            f"array of the shape {list(array.shape)}."
        )
    # As float32 0.485 is 0.48500001: the shortest decimal that rounds to it is meant.
    values = tuple(float(str(value)) for value in array.ravel())
    if not np.isfinite(values).all():
        raise UsageError(f"{name} must be finite; got {_listed(values)}.")
    return values


def _each_channel(
    name: str, given: PerChannel | None, values: tuple[float, ...], channels: int
) -> tuple[float, ...]:
    """Repeat one number, which is no sequence, for all channels."""
    if given is None or np.ndim(given.detach() if isinstance(given, Tensor) else given) == 0:
        return values * channels
    if len(values) != channels:
        raise UsageError(
            f"{name} needs one value for each of the {channels} input channels; "
            f"got {len(values)}: {_listed(values)}."
        )
    return values


def _refuse_bytes(mean: tuple[float, ...] | None, std: tuple[float, ...] | None) -> None:
    """Refuse mean and std of pixels in 0..255, and write their division by 255 out.

    A std of exactly 1 beside such a mean belongs to pixels in 0..255, too: "no scaling".
    """
    parts = []
    for name, values in (("mean", mean), ("std", std)):
        if values is None:
            continue
        large = max(map(abs, values)) > 1
        unscaled = name == "std" and set(values) == {1.0}
        divided = tuple(value / 255 for value in values)
        if large or unscaled:
            parts.append(f"{name} {_listed(divided)} (= {_listed(values)} / 255)")
        else:
            parts.append(f"{name} {_listed(values)} (as it is)")
    if std is None:
        parts.append("std 0.003922 (= 1 / 255), if pixels in 0..255 are not scaled")
    high = " and ".join(
        f"{name} {_listed(values)}"
        for name, values in (("mean", mean), ("std", std))
        if values is not None and max(map(abs, values)) > 1
    )
    raise UsageError(
        f"mean and std must be for pixels in 0..1, where neither exceeds 1; {high} is for pixels "
        f"in 0..255. Give {', '.join(parts)}."
    )


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4g}" if abs(value) < 1 else f"{value:g}" for value in values)
