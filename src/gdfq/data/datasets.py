"""Real images: .npz files, image folders, tensors."""

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from zipfile import ZipFile, is_zipfile

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gdfq.data.class_names import ClassNames
from gdfq.data.decoding import check_image, decoded
from gdfq.data.folders import SUFFIXES, image_files, read_folder
from gdfq.data.preprocessing import Preprocessing, Resize
from gdfq.errors import GdfqWarning, UsageError, first_line
from gdfq.files.untrusted import read_npz


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
    """Image files that are read and resized when they are needed.

    Attributes:
        files: The image files.
        labels: Integers [N], or None.
        shape: What the network takes, [C, H, W].
        resize: How an image gets this size.
        rule: By what the labels are known, or why they are not, for the user.
    """

    files: tuple[Path, ...]
    labels: Tensor | None
    shape: tuple[int, int, int]
    resize: Resize
    rule: str = ""

    def __len__(self) -> int:
        return len(self.files)

    def images(self, chosen: Tensor) -> Tensor:
        return torch.stack([self._read(self.files[int(i)]) for i in chosen])

    def readable(self, chosen: Tensor) -> tuple[Tensor, dict[int, str]]:
        """Return images of which some may be damaged, as `readable_images` does."""
        images = torch.zeros(len(chosen), *self.shape, dtype=torch.uint8)
        damaged = {}
        for place, index in enumerate(chosen.tolist()):
            try:
                images[place] = self._decoded(self.files[index])
            except Exception as error:  # each decoder has types of its own for damaged files
                damaged[place] = f"{self.files[index]} ({first_line(error)})"
        return images, damaged

    def _read(self, file: Path) -> Tensor:
        try:
            return self._decoded(file)
        except Exception as error:  # each decoder has types of its own for damaged files
            raise _unreadable(file, error) from error

    def _decoded(self, file: Path) -> Tensor:
        channels, height, width = self.shape
        image = self.resize(decoded(file, channels), (width, height))
        return _channels_first(np.array(image), channels)


def readable_images(data: ImageData, chosen: Tensor) -> tuple[Tensor, dict[int, str]]:
    """Read images of which some may be damaged.

    Args:
        data: The images.
        chosen: Indices [n].

    Returns:
        As `data.images`, with zeros for files that cannot be decoded; and for each of these its
        place in `chosen`, its name and what is wrong with it.
    """
    if isinstance(data, FolderData):
        return data.readable(chosen)
    return data.images(chosen), {}


def _channels_first(image: np.ndarray[Any, Any], channels: int) -> Tensor:
    """Return pixels [H, W] of one channel, or [H, W, C], as [C, H, W]."""
    pixels = torch.from_numpy(image)
    return pixels[None] if channels == 1 else pixels.permute(2, 0, 1)


def _unreadable(file: Path, error: Exception) -> UsageError:
    return UsageError(
        f"every file of an image folder must be a readable image; {file} is not: {error}. "
        "Repair or remove it."
    )


def load_data(
    data: "str | Path | Tensor | np.ndarray[Any, Any] | tuple[Any, Any] | ImageData",
    input_shape: tuple[int, ...],
    classes: int | None,
    resize: Resize = Resize(),
    names: ClassNames | None = None,
) -> ImageData:
    """Read images for a network.

    Args:
        data: An `.npz` file (`images` uint8 [N, C, H, W], `labels` [N]), an image folder (see
            `gdfq.data.folders`), a tensor or array of images (uint8 pixels, or floats that are
            already normalised), or a pair of images and labels.
        input_shape: Shape of one input of the network, [C, *size].
        classes: Number of its classes, if it has any.
        resize: Of the files of an image folder; the others must have the network's size.
        names: Names of the classes, which identify class folders.

    Raises:
        UsageError: The data are missing, unreadable or empty, or have another shape or labels out
            of range.
    """
    if isinstance(data, str | Path) and Path(data).is_dir():
        loaded: ImageData = _folder(Path(data), input_shape, classes, resize, names)
    else:
        loaded = _in_one(data, classes)
    _check(loaded, input_shape, classes)
    return loaded


def load_unlabelled(data: Any, input_shape: tuple[int, ...], resize: Resize) -> ImageData:
    """Read images that have nothing to do with the classes of a network.

    All images of a folder are taken, whatever folders they lie in. Images of another size are
    resized and cropped, those of an `.npz` file or a tensor of pixels too.

    Args:
        data: As in `load_data`; labels are dropped.
        input_shape: Shape of one input of the network, [C, *size].
        resize: How an image gets the network's size.

    Raises:
        UsageError: The data are missing, unreadable or empty, or have other channels.
    """
    if isinstance(data, str | Path) and Path(data).is_dir():
        size = _image_size(input_shape)
        files = image_files(Path(data))
        if not files:
            raise UsageError(
                f"a folder of photographs must hold images ({', '.join(sorted(SUFFIXES))}); "
                f"{data} holds none."
            )
        _check_headers(Path(data), files, (size[2], size[1]))
        return FolderData(files, None, size, resize)
    found = _in_one(data, None)
    if not isinstance(found, ArrayData):
        loaded: ImageData = found
    elif _needs_resizing(found.array, input_shape):
        loaded = ResizedData(found.array, _image_size(input_shape), resize)
        _warn_of_small(found.array, input_shape)
    else:
        loaded = ArrayData(found.array, None)
    _check(loaded, input_shape, None)
    return loaded


@dataclass(frozen=True, eq=False)
class ResizedData:
    """Pixels in memory that are resized when they are needed.

    Attributes:
        array: uint8 [N, C, h, w].
        shape: What the network takes, [C, H, W].
        resize: How an image gets this size.
    """

    array: Tensor
    shape: tuple[int, int, int]
    resize: Resize
    labels: None = None

    def __len__(self) -> int:
        return len(self.array)

    def images(self, chosen: Tensor) -> Tensor:
        return torch.stack([self._resized(self.array[int(i)]) for i in chosen])

    def _resized(self, image: Tensor) -> Tensor:
        channels, height, width = self.shape
        pixels = image[0] if channels == 1 else image.permute(1, 2, 0)
        resized = self.resize(Image.fromarray(pixels.numpy()), (width, height))
        return _channels_first(np.array(resized), channels)


def _needs_resizing(array: Tensor, input_shape: tuple[int, ...]) -> bool:
    """Whether pixels [N, C, h, w] have the channels of a network and another size."""
    return (
        array.dtype == torch.uint8
        and array.ndim == len(input_shape) + 1 == 4
        and array.shape[1] == input_shape[0]
        and tuple(array.shape[2:]) != input_shape[1:]
        and len(array) > 0
    )


def _warn_of_small(array: Tensor, input_shape: tuple[int, ...]) -> None:
    if any(side < least for side, least in zip(array.shape[2:], input_shape[1:], strict=True)):
        warnings.warn(
            f"the images are {array.shape[3]}x{array.shape[2]}, smaller than the network's input, "
            "and are enlarged, which blurs them.",
            GdfqWarning,
            stacklevel=3,
        )


def _in_one(data: Any, classes: int | None) -> ImageData:
    """Read what is one file, or in memory."""
    if isinstance(data, str | Path):
        return _npz(Path(data))
    if isinstance(data, Tensor | np.ndarray):
        return ArrayData(_array(data), None)
    if isinstance(data, tuple | list) and len(data) == 2:
        images, labels = data
        return ArrayData(_array(images), as_labels(labels, classes))
    if hasattr(data, "images") and hasattr(data, "labels"):
        given: ImageData = data
        return given
    raise UsageError(
        "data must be an .npz file, an image folder, a tensor of images or a pair of images "
        f"and labels; got a {type(data).__name__}."
    )


def _array(images: Any) -> Tensor:
    try:
        return torch.as_tensor(images).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"images must be a tensor or an array of numbers; {first_line(error)}."
        ) from error


def as_labels(labels: Any, classes: int | None = None) -> Tensor:
    """Return labels as integers [N].

    Raises:
        UsageError: They are no whole numbers, or not one for each image.
    """
    try:
        given = torch.as_tensor(labels).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"labels must be whole numbers [N], the indices of classes; {first_line(error)}."
        ) from error
    if given.ndim == 2 and given.shape[1] == classes != 1:
        raise UsageError(
            f"labels must be the indices of classes [N]; these are {list(given.shape)}, a number "
            "for each class. Give labels.argmax(1)."
        )
    if given.ndim == 2 and given.shape[1] == 1:
        raise UsageError(
            f"labels must be the indices of classes [N]; these are {list(given.shape)}. "
            "Give labels[:, 0]."
        )
    usable = given.dtype != torch.bool and not given.is_complex()
    if given.is_floating_point():
        usable = bool((given == given.trunc()).all())
    if not usable:
        raise UsageError(
            "labels must be whole numbers [N], the indices of classes; these are "
            f"{given.dtype} with other values. Give integers."
        )
    return given.to(torch.int64)


def _npz(path: Path) -> ArrayData:
    try:
        arrays = read_npz(path, ("images", "labels"))
    except FileNotFoundError as error:
        raise UsageError(f"there is no data at {path}. Give an .npz file or a folder.") from error
    except Exception as error:  # zipfile and zlib raise types of their own
        raise UsageError(
            f"data must be a readable .npz file or an image folder; {path} is neither: "
            f"{_kind_of_file(path) or error}."
        ) from error
    if "images" not in arrays:
        raise UsageError(f"an .npz file must hold 'images'; {path} has {_members(path)}.")
    images, labels = arrays["images"], arrays.get("labels")
    if images.dtype != np.uint8:
        raise UsageError(
            f"'images' must be uint8 pixels; in {path} they are {images.dtype}. {_to_bytes(images)}"
        )
    found = None
    if labels is not None:
        if labels.dtype.kind not in "iufb":
            raise UsageError(f"'labels' must be integers; in {path} they are {labels.dtype}.")
        found = as_labels(labels.astype(np.float64 if labels.dtype.kind == "f" else labels.dtype))
    return ArrayData(torch.from_numpy(images), found)


def _to_bytes(images: np.ndarray[Any, Any]) -> str:
    """How images of another dtype become pixels."""
    convert = "np.savez(FILE, images={}, labels=labels)"
    low, high = (images.min(), images.max()) if images.size else (0, 0)
    if images.dtype.kind == "b":
        return f"Write {convert.format('images.astype(np.uint8) * 255')}."
    if images.dtype.kind in "iu" and 0 <= low <= high <= 255:
        return f"Write {convert.format('images.astype(np.uint8)')} if 255 is white."
    if images.dtype == np.uint16:
        return (
            f"Write {convert.format('(images / 257).round().astype(np.uint8)')} if 65535 is white."
        )
    if images.dtype.kind == "f" and 0 <= low <= high <= 1:
        return f"Write {convert.format('(images * 255).round().astype(np.uint8)')} if 1 is white."
    if images.dtype.kind == "f" and 0 <= low <= high <= 255:
        return f"Write {convert.format('images.round().astype(np.uint8)')} if 255 is white."
    return "Convert them to 0..255; from Python, floats that are already normalised can be given."


def _members(path: Path) -> str:
    """What an archive holds, for an error."""
    with ZipFile(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
    if any(Path(name).suffix.lower() in SUFFIXES for name in names):
        return f"image files ({names[0]}). Unpack the archive and give the folder"
    return ", ".join(names[:5]) or "nothing"


def _kind_of_file(path: Path) -> str | None:
    """What a file is instead of an .npz file, and what to do, where that is plain."""
    try:
        with path.open("rb") as file:
            begin = file.read(8)
    except OSError:
        return None
    if begin.startswith(b"\x93NUMPY"):
        return (
            "it is one array. Write np.savez(FILE, images=images, labels=labels) with uint8 pixels "
            "(gdfq generate writes images.npz beside images.npy)"
        )
    if path.suffix.lower() in SUFFIXES:
        return "it is one image. Give the folder that holds the folders of the classes"
    if path.suffix.lower() in {".gz", ".tgz", ".tar", ".7z", ".rar"} and not is_zipfile(path):
        return "it is an archive. Unpack it and give the folder"
    return None


def _folder(
    path: Path,
    input_shape: tuple[int, ...],
    classes: int | None,
    resize: Resize,
    names: ClassNames | None,
) -> FolderData:
    shape = _image_size(input_shape)
    found = read_folder(path, classes, names)
    _check_headers(path, found.files)
    return FolderData(
        found.files,
        None if found.labels is None else torch.tensor(found.labels, dtype=torch.long),
        shape,
        resize,
        found.rule,
    )


def _image_size(input_shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Return the shape [C, H, W] of what image files become.

    Raises:
        UsageError: The network does not take such images.
    """
    if len(input_shape) != 3 or input_shape[0] not in (1, 3):
        raise UsageError(
            "an image folder needs a network with 1 or 3 input channels [C, H, W]; "
            f"this one takes {list(input_shape)}. Use an .npz file."
        )
    channels, height, width = input_shape
    return channels, height, width


def _check_headers(path: Path, files: Sequence[Path], least: tuple[int, int] = (0, 0)) -> None:
    """Refuse files that are no images before anything runs, and tell what of them is not used."""
    unused: Counter[str] = Counter()
    for file in files:
        try:
            unused.update(check_image(file, least))
        except Exception as error:  # each decoder has types of its own for damaged files
            raise _unreadable(file, error) from error
    told = {
        "frames": "hold several frames, of which the first is used",
        "orientation": "have an EXIF orientation, which is not applied (nor is it in torchvision)",
        "small": "are smaller than the network's input and are enlarged, which blurs them",
    }
    for what, count in sorted(unused.items()):
        warnings.warn(
            f"{count} of {len(files)} images in {path} {told[what]}.", GdfqWarning, stacklevel=3
        )


def _check(data: ImageData, input_shape: tuple[int, ...], classes: int | None) -> None:
    if isinstance(data, ArrayData) and not data.array.ndim:
        raise UsageError("images must be [N, C, *size]; this is a single number.")
    if not len(data):
        raise UsageError(
            "data must hold at least one image; this holds none. "
            "An image folder has one sub-folder for each class with the images in it "
            f"({', '.join(sorted(SUFFIXES))})."
        )
    first = data.images(torch.tensor([0]))
    if first.dtype != torch.uint8 and not first.is_floating_point():
        raise UsageError(
            "images must be uint8 pixels or floats that are already normalised; "
            f"these are {first.dtype}. "
            f"{_to_bytes(data.images(torch.arange(min(len(data), 100))).numpy())}"
        )
    shape = tuple(first.shape[1:])
    if shape != input_shape:
        raise UsageError(
            f"images must have the network's input shape {list(input_shape)}; "
            f"these are {list(shape)}. {_reshaping(shape, input_shape)}"
        )
    floats = data.array if isinstance(data, ArrayData) else first
    if floats.is_floating_point() and not bool(floats.isfinite().all()):
        raise UsageError(
            "images must be finite; these hold NaN or infinity. Check where they come from."
        )
    check_labels(data.labels, len(data), classes)


def _reshaping(shape: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    """How images of another shape get the network's."""
    if len(wanted) == 3:
        channels, height, width = wanted
        if shape == (height, width, channels):
            return "Their channels come last: give images.transpose(0, 3, 1, 2), or permute."
        if channels == 1 and shape == (height, width):
            return "Give images[:, None]."
        if len(shape) == 3 and shape[1:] == (height, width):
            if shape[0] == 4:
                return "The fourth channel may be alpha: give images[:, :3]."
            if shape[0] == 1:
                return f"Repeat the channel: give images.repeat({channels}, 1) of an array."
            return f"They have {shape[0]} channels for {channels}."
    return "Resize them; files in folders are resized as they are read."


def how_labelled(data: object) -> str:
    """Why data have no labels, where that is known, and how to give them."""
    return getattr(data, "rule", "") or (
        "Give (images, labels), an .npz file with both, or a folder with one folder a class."
    )


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
        from_one = (low, high) == (1, classes)
        raise UsageError(
            f"labels must lie in 0..{classes - 1}, the network's classes; these span "
            f"{low}..{high}. "
            + (
                "They count from 1: give labels - 1."
                if from_one
                else "Check that data and network belong together."
            )
        )


def warn_of_unnormalised_floats(images: Tensor, preprocessing: Preprocessing) -> None:
    """Warn about floats that look like pixels in 0..1 or 0..255 and are taken as normalised."""
    if not images.is_floating_point() or not images.numel():
        return
    limits = [
        (edge - mean) / std
        for edge in (0, 1)
        for mean, std in zip(preprocessing.mean, preprocessing.std, strict=True)
    ]
    low, high = float(images.min()), float(images.max())
    bytes_ = 2 * max(limits) < 25 < high <= 255
    unit = min(limits) < -0.5 and high <= 1
    if low >= 0 and (bytes_ or unit):
        warnings.warn(
            f"floats are taken as normalised inputs; these lie in {low:.3g}..{high:.3g}, and "
            f"pixels, normalised, in {min(limits):.3g}..{max(limits):.3g}. If they are pixels, "
            "give them as uint8, which are normalised.",
            GdfqWarning,
            stacklevel=3,
        )
