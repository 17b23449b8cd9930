"""Image files as 8-bit pixels, for each mode that a file may have.

Pillow clips when it converts from modes with more than 8 bits, so these are scaled here: 16-bit
files by 65535, 12-bit TIFF files by 4095, floats in 0..1 by 1. Everything else is what
`Image.convert` makes of it, as in torchvision: alpha is dropped, of an animation the first frame is
used, and an EXIF orientation is not applied.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from gdfq.files.untrusted import check_pixels

_DECODERS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "PPM")
"""Pillow's names of these formats. Whatever a file is called, no other decoder reads it."""
_TIFF_BITS, _TIFF_SAMPLE_FORMAT, _EXIF_ORIENTATION = 258, 339, 274
_TIFF_UNSIGNED = 1
_CONVERTIBLE = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"}


def check_image(path: Path, least: tuple[int, int] = (0, 0)) -> frozenset[str]:
    """Read the header of an image file.

    Args:
        path: The file.
        least: Width and height below which it is "small".

    Returns:
        What the user should know of it: "frames" and "orientation", which are not used; "small".

    Raises:
        Exception: It is no image that `decoded` can read; each decoder has types of its own.
    """
    with Image.open(path, formats=_DECODERS) as image:
        check_pixels(*image.size)
        if image.mode not in _CONVERTIBLE and image.mode != "F":
            _highest(image)
        found = set()
        if getattr(image, "is_animated", False):
            found.add("frames")
        if image.format == "JPEG" and image.getexif().get(_EXIF_ORIENTATION, 1) != 1:
            found.add("orientation")
        if image.width < least[0] or image.height < least[1]:
            found.add("small")
        return frozenset(found)


def decoded(path: Path, channels: int) -> Image.Image:
    """Return the pixels of an image file, as 8-bit grey or RGB.

    Raises:
        Exception: It is no readable image; each decoder has types of its own.
    """
    mode = "L" if channels == 1 else "RGB"
    with Image.open(path, formats=_DECODERS) as image:
        check_pixels(*image.size)  # before they are decoded
        if image.mode in _CONVERTIBLE:
            return image.convert(mode)
        values = np.asarray(image)
        if image.mode == "F":
            low, high = float(values.min()), float(values.max())
            if not (low >= 0 and high <= 1):
                raise ValueError(
                    f"it holds floats in {low:g}..{high:g}, and floats must lie in 0..1. Convert "
                    "it to 8 bits"
                )
            scaled = values * 255.0
        else:
            scaled = values.astype(np.float64) * (255 / _highest(image))
        return Image.fromarray(np.rint(scaled).clip(0, 255).astype(np.uint8)).convert(mode)


def _highest(image: Image.Image) -> int:
    """The value of white in an image of integers with more than 8 bits.

    Raises:
        ValueError: Its type does not say.
    """
    if image.format == "TIFF":
        tags = getattr(image, "tag_v2", {})
        (bits, *_), (kind, *_) = tags.get(_TIFF_BITS, (1,)), tags.get(_TIFF_SAMPLE_FORMAT, (1,))
        if kind == _TIFF_UNSIGNED and image.mode.startswith("I;16"):
            return int(2 ** int(bits)) - 1
    elif image.mode == "I" or image.mode.startswith("I;16"):  # PNG, and PGM as Pillow scales it
        return 2**16 - 1
    raise ValueError(
        f"it holds pixels of Pillow's mode {image.mode}, whose white is unknown. Convert it to "
        "8 bits"
    )
