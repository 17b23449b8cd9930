"""Real images: .npz files, image folders, tensors."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from gdfq.data.preprocessing import Resize
from gdfq.errors import UsageError
from gdfq.files.untrusted import check_pixels, read_npz, within

if TYPE_CHECKING:
    pass

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
_DECODERS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "PPM")
"""Pillow's names of these formats. Whatever a file is called, no other decoder reads it."""


class ImageData(Protocol):
    """Images with or without labels."""

    @property
    def labels(self) -> Tensor | None:
        """Integers [N], or None."""
        ...

    def __len__(self) -> int: ...

    def images(self, chosen: Tensor) -> Tensor:
        """The images of the given indices: uint8 pixels, or floats that are already normalised."""
        ...


@dataclass(frozen=True, eq=False)
class ArrayData:
    """Images that are in memory."""

    array: Tensor
    labels: Tensor | None

    def __len__(self) -> int:
        return len(self.array)

    def images(self, chosen: Tensor) -> Tensor:
        return self.array[chosen]


@dataclass(frozen=True, eq=False)
class FolderData:
    """Image files that are read and resized when they are needed."""

    files: tuple[Path, ...]
    labels: Tensor | None
    shape: tuple[int, int, int]
    resize: Resize

    def __len__(self) -> int:
        return len(self.files)

    def images(self, chosen: Tensor) -> Tensor:
        return torch.stack([self._read(self.files[int(i)]) for i in chosen])

    def _read(self, file: Path) -> Tensor:
        from PIL import Image

        channels, height, width = self.shape
        try:
            with Image.open(file, formats=_DECODERS) as opened:
                check_pixels(*opened.size)  # before they are decoded
                image = opened.convert("L" if channels == 1 else "RGB")
            image = self.resize(image, (width, height))
        except Exception as error:  # each decoder has types of its own for damaged files
            raise UsageError(
                f"every file of an image folder must be a readable image; {file} is not: {error}."
            ) from error
        pixels = torch.from_numpy(np.array(image))
        return pixels[None] if channels == 1 else pixels.permute(2, 0, 1)


def load_data(
    data: "str | Path | Tensor | tuple[Tensor, Tensor] | ImageData",
    input_shape: tuple[int, ...],
    classes: int | None,
    resize: Resize = Resize(),
) -> ImageData:
    """Images for a network of the given input shape and number of classes, if it has any.

    data: an `.npz` file (`images` uint8 [N, C, H, W], `labels` [N]), an image folder (a
    sub-folder for each class; their sorted order is the class index), a tensor of images (uint8
    pixels, or floats that are already normalised), or a pair of images and labels.
    resize: of the files of an image folder; the others must have the network's size.

    Raises UsageError for missing, unreadable or empty data, other shapes, labels out of range.
    """
    if isinstance(data, str | Path):
        path = Path(data)
        if path.is_dir():
            loaded: ImageData = _folder(path, input_shape, resize)
        else:
            loaded = _npz(path)
    elif isinstance(data, Tensor | np.ndarray):
        loaded = ArrayData(torch.as_tensor(data), None)
    elif isinstance(data, tuple | list) and len(data) == 2:
        images, labels = (torch.as_tensor(part) for part in data)
        loaded = ArrayData(images, labels.long())
    elif hasattr(data, "images") and hasattr(data, "labels"):
        loaded = data
    else:
        raise UsageError(
            "data must be an .npz file, an image folder, a tensor of images or a pair of images "
            f"and labels; got a {type(data).__name__}."
        )
    _check(loaded, input_shape, classes)
    return loaded


def _npz(path: Path) -> ArrayData:
    try:
        arrays = read_npz(path, ("images", "labels"))
    except FileNotFoundError as error:
        raise UsageError(f"there is no data at {path}. Give an .npz file or a folder.") from error
    except Exception as error:  # zipfile and zlib raise types of their own
        raise UsageError(
            f"data must be a readable .npz file or an image folder; {path} is neither: {error}."
        ) from error
    if "images" not in arrays:
        has = ", ".join(arrays) or "neither images nor labels"
        raise UsageError(f"an .npz file must hold 'images'; {path} has {has}.")
    images, labels = arrays["images"], arrays.get("labels")
    if images.dtype != np.uint8:
        raise UsageError(f"'images' must be uint8 pixels; in {path} they are {images.dtype}.")
    if labels is None:
        return ArrayData(torch.from_numpy(images), None)
    if not np.issubdtype(labels.dtype, np.integer):
        raise UsageError(f"'labels' must be integers; in {path} they are {labels.dtype}.")
    return ArrayData(torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64)))


def _folder(path: Path, input_shape: tuple[int, ...], resize: Resize) -> FolderData:
    if len(input_shape) != 3 or input_shape[0] not in (1, 3):
        raise UsageError(
            "an image folder needs a network with 1 or 3 input channels [C, H, W]; "
            f"this one takes {list(input_shape)}. Use an .npz file."
        )
    classes = sorted(within(path, entry) for entry in path.iterdir() if entry.is_dir())
    found = [
        (within(path, file), index)
        for index, folder in enumerate(classes)
        for file in sorted(folder.iterdir())
        if file.suffix.lower() in _SUFFIXES
    ]
    channels, height, width = input_shape
    return FolderData(
        tuple(file for file, _ in found),
        torch.tensor([index for _, index in found], dtype=torch.long),
        (channels, height, width),
        resize,
    )


def _check(data: ImageData, input_shape: tuple[int, ...], classes: int | None) -> None:
    if isinstance(data, ArrayData) and not data.array.ndim:
        raise UsageError("images must be [N, C, *size]; this is a single number.")
    if not len(data):
        raise UsageError(
            "data must hold at least one image; this holds none. "
            "An image folder has one sub-folder for each class with the images in it."
        )
    first = data.images(torch.tensor([0]))
    if first.dtype != torch.uint8 and not first.is_floating_point():
        raise UsageError(
            "images must be uint8 pixels or floats that are already normalised; "
            f"these are {first.dtype}."
        )
    shape = tuple(first.shape[1:])
    if shape != input_shape:
        raise UsageError(
            f"images must have the network's input shape {list(input_shape)}; "
            f"these are {list(shape)}. Resize them; files in folders are resized as they are read."
        )
    check_labels(data.labels, len(data), classes)


def check_labels(labels: Tensor | None, count: int, classes: int | None) -> None:
    """Check the labels of `count` images, for a network that has classes.

    Raises:
        UsageError: There is not one label for each image, or a label is no class.
    """
    if labels is None or classes is None:
        return
    if labels.ndim != 1 or len(labels) != count:
        raise UsageError(
            f"there must be one label for each image; got labels {list(labels.shape)} "
            f"for {count} images."
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise UsageError(
            f"labels must lie in 0..{classes - 1}, the network's classes; these span "
            f"{low}..{high}. Check that data and network belong together."
        )
