"""Image folders: which files are images, in which order, and which class a folder stands for.

The layout and the order are those of torchvision's `ImageFolder`. It differs in two points:
folders of the system are no classes, and the position of a folder is its label only if there are as
many folders as classes.
"""

import os
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gdfq.data.class_names import ClassNames, imagenet, normalised
from gdfq.errors import GdfqWarning, UsageError
from gdfq.files.untrusted import within

SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"))
"""Suffixes of image files: those of torchvision."""
_OTHER_IMAGES = frozenset(
    (".gif", ".heic", ".heif", ".avif", ".jp2", ".jfif", ".jxl", ".npy", ".dcm", ".dng", ".tga")
)
"""Suffixes of image files that are not read."""
CLASSES_FILE = "classes.txt"
_CLASSES_BYTES = 2**22
_SYSTEM_NAMES = frozenset(
    (
        *("__macosx", "thumbs.db", "desktop.ini", "@eadir", "$recycle.bin", "lost+found"),
        *("__pycache__", "system volume information"),
    )
)
"""Names, in lower case, that operating systems and tools leave beside images."""
_SPLITS = frozenset(("train", "training", "val", "valid", "validation", "test", "testing"))


@dataclass(frozen=True)
class ImageFolder:
    """The image files of a folder.

    Attributes:
        files: All image files, class by class, in the order of torchvision.
        labels: The class of each; None if nobody knows them.
        rule: By what the labels are known, or why they are not, for the user.
    """

    files: tuple[Path, ...]
    labels: tuple[int, ...] | None
    rule: str


def read_folder(path: Path, classes: int | None, names: ClassNames | None = None) -> ImageFolder:
    """Find the images of a folder and their labels.

    Args:
        path: A folder with one sub-folder for each class, or with images alone.
        classes: Number of classes of the network, if it has any.
        names: Names of these classes, if the network has any.

    Raises:
        UsageError: The sub-folders are splits and no classes, `classes.txt` cannot be used, or a
            link leads out of the folder.
    """
    entries = _entries(path)
    folders = [entry for entry in entries if entry.is_dir()]
    loose = [entry for entry in entries if _is_image(entry)]
    if not folders:
        _warn_of_other_images(entries)
        return ImageFolder(tuple(loose), None, "no labels: the images lie in no class folder")
    if loose:
        _warn(
            f"{len(loose)} image files, such as {loose[0].name}, lie beside the class folders of "
            f"{path} and are not used. Move them into the folder of their class."
        )
    walked = [list(_walk(path, folder)) for folder in folders]
    _warn_of_other_images([file for files in walked for file in files])
    images = [[file for file in files if _is_image(file)] for files in walked]
    in_order = tuple(file for files in images for file in files)
    if classes is None:
        return ImageFolder(in_order, None, "no labels: the network has no classes")
    _refuse_splits(path, folders, walked)
    listed = _names_in(path, classes)
    try:
        order, rule = class_indices(
            [folder.name for folder in folders], classes, listed, names, path
        )
    except UsageError as error:  # who needs labels refuses these images, by this reason
        return ImageFolder(in_order, None, str(error))
    pairs = sorted(
        ((order[folder.name], files) for folder, files in zip(folders, images, strict=True)),
        key=lambda pair: pair[0],
    )
    return ImageFolder(
        tuple(file for _, files in pairs for file in files),
        tuple(index for index, files in pairs for _ in files),
        rule,
    )


def image_files(path: Path) -> tuple[Path, ...]:
    """Return all image files of a folder and of the folders in it, whatever these stand for.

    Raises:
        UsageError: A link leads out of the folder.
    """
    files = list(_walk(path, path))
    _warn_of_other_images(files)
    return tuple(file for file in files if _is_image(file))


def class_indices(
    folders: Sequence[str],
    classes: int,
    listed: ClassNames | None = None,
    known: ClassNames | None = None,
    path: Path | str = "the folder",
) -> tuple[dict[str, int], str]:
    """Which class each folder stands for, and by which rule.

    In this order: the names of `classes.txt`; the network's own names; numbers at their word; the
    ids of ImageNet; the order of the names, if there is one folder for each class.

    Args:
        folders: Names of folders in the order of their strings.
        classes: Number of classes of the network.
        listed: Names of the classes in `classes.txt`.
        known: Names of the classes that the network has.
        path: Where they lie, for messages.

    Raises:
        UsageError: None of these rules holds.
    """
    if listed is not None:
        found = _by_name(folders, listed, CLASSES_FILE, path)
        if missing := [name for name in folders if name not in found]:
            raise UsageError(
                f"each folder must be a class of {CLASSES_FILE}; in {path} there are also "
                f"{_few(missing)}, and the file has {_few([n[0] for n in listed])}. Correct the "
                "names, or move these folders away."
            )
        return found, f"labels by {CLASSES_FILE}"
    if known is not None:
        found = _by_name(folders, known, "the network's class names", path)
        if len(found) == len(folders):
            return found, "labels by the network's class names"
    if all(re.fullmatch(r"[+-]?[0-9]{1,9}", name) for name in folders):
        return _by_number(folders, classes, path)
    if classes == len(imagenet()):
        found = _by_name(folders, imagenet(), "ImageNet", path)
        if len(found) == len(folders):
            return found, "labels by the WordNet ids of ImageNet"
    if known is not None or len(folders) != classes:
        shown = "" if known is None else f" ({_few([names[0] for names in known])})"
        raise UsageError(
            f"the folders of {path} must be the network's {classes} classes{shown}; there are "
            f"{len(folders)}: {_few(folders)}. Which class each is cannot be known: write "
            f"{CLASSES_FILE} into that folder, with the name of one class a line, in the order of "
            "the network's outputs."
        )
    if (natural := sorted(folders, key=_natural)) != list(folders):
        first, second = next((a, b) for a, b in zip(folders, natural, strict=True) if a != b)
        _warn(
            f"the classes are the folders of {path} in the order of their names as text, as in "
            f"torchvision: {first!r} comes before {second!r}. If the network has them in another "
            f"order, write {CLASSES_FILE} into that folder, with one name a line."
        )
    return {name: i for i, name in enumerate(folders)}, "labels by the order of the folders"


def _by_number(
    folders: Sequence[str], classes: int, path: Path | str
) -> tuple[dict[str, int], str]:
    """Folders whose names are numbers: 0..N-1 at their word, or all of 1..N."""
    numbers = {name: int(name) for name in folders}
    values = sorted(numbers.values())
    if len(set(values)) < len(values):
        raise UsageError(
            f"each folder must be another class; of those of {path}, {_few(folders)}, some are the "
            "same number. Rename or merge them."
        )
    first = 1 if values == list(range(1, classes + 1)) else 0
    if values[0] < first or values[-1] >= first + classes:
        raise UsageError(
            f"folders that are named by numbers must lie in 0..{classes - 1}, the network's "
            f"classes; in {path} they are {_few([str(value) for value in values])}. Rename them, "
            f"or write {CLASSES_FILE} into that folder, with the name of one class a line, in the "
            "order of the network's outputs."
        )
    if len(folders) == classes and sorted(numbers, key=numbers.__getitem__) != sorted(folders):
        _warn(
            f"the folders of {path} are named by numbers, which are taken as the classes. "
            "torchvision's ImageFolder takes them in the order of their names as text (10 before "
            f"2). If the network was trained on that order, write {CLASSES_FILE} into that folder, "
            "with one name a line."
        )
    return {name: number - first for name, number in numbers.items()}, (
        "labels by the numbers that name the folders" + (", less 1" if first else "")
    )


def _by_name(
    folders: Sequence[str], names: ClassNames, what: str, path: Path | str
) -> dict[str, int]:
    """The folders that are named as a class is. Raises UsageError if two are the same class."""
    exact: dict[str, set[int]] = {}
    loose: dict[str, set[int]] = {}
    for index, aliases in enumerate(names):
        for alias in aliases:
            exact.setdefault(alias, set()).add(index)
            loose.setdefault(normalised(alias), set()).add(index)
    found = {}
    for folder in folders:
        indices = exact.get(folder) or loose.get(normalised(folder)) or set()
        if len(indices) == 1:  # a name that two classes have says nothing
            (found[folder],) = indices
    if len(set(found.values())) < len(found):
        twice = [name for name in found if list(found.values()).count(found[name]) > 1]
        raise UsageError(
            f"each folder must be another class; of those of {path}, {_few(twice)} are the same "
            f"in {what}. Merge them."
        )
    return found


def _names_in(path: Path, classes: int) -> ClassNames | None:
    """The names of `classes.txt` in the folder, if it is there."""
    file = path / CLASSES_FILE
    return class_names_of(file, classes) if within(path, file).is_file() else None


def class_names_of(file: Path, classes: int) -> ClassNames:
    """Read names of classes, one a line.

    Args:
        file: A text file.
        classes: Number of classes of the network.

    Raises:
        UsageError: The file cannot be read, or has another number of names.
    """
    try:
        if file.stat().st_size > _CLASSES_BYTES:
            raise ValueError("it is too large")
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, ValueError) as error:
        raise UsageError(f"{file.name} must be text; {file} cannot be read: {error}.") from error
    names = tuple((line,) for line in lines if line)
    if len(names) != classes:
        raise UsageError(
            f"{file.name} must have a line for each of the network's {classes} classes; {file} "
            f"has {len(names)}: {_few([name for (name,) in names])}."
        )
    return names


def _entries(folder: Path, root: Path | None = None) -> list[Path]:
    """What lies in a folder, in the order of names, without what is hidden or of the system.

    Raises:
        UsageError: A link leads out of the root (by default the folder), or something is no file.
    """
    found = sorted(folder.iterdir(), key=lambda entry: entry.name)
    return [within(root or folder, entry) for entry in found if not _is_hidden(entry.name)]


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _SYSTEM_NAMES


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.is_dir()


def _walk(root: Path, folder: Path) -> Iterator[Path]:
    """The files below a folder: torchvision sorts folders by their path, then files by name."""
    places = [folder, *_below(root, folder, (os.path.realpath(folder),))]
    for place in sorted(places, key=str):
        yield from (entry for entry in _entries(place, root) if not entry.is_dir())


def _below(root: Path, folder: Path, around: tuple[str, ...]) -> Iterator[Path]:
    """All folders below a folder; a link to one around it is not followed in a circle."""
    for entry in _entries(folder, root):
        real = os.path.realpath(entry)
        if entry.is_dir() and real not in around:
            yield entry
            yield from _below(root, entry, (*around, real))


def _refuse_splits(path: Path, folders: Sequence[Path], walked: Sequence[Sequence[Path]]) -> None:
    """Refuse a folder of train and test folders, which are no classes."""
    if not {folder.name.lower() for folder in folders} <= _SPLITS:
        return
    if any(file.parent in folders for files in walked for file in files):
        return
    raise UsageError(
        f"an image folder must have a sub-folder for each class; those of {path} are "
        f"{_few([folder.name for folder in folders])}, with folders in them. Give one of them, as "
        f"{folders[0]}."
    )


def _warn_of_other_images(entries: Sequence[Path]) -> None:
    other = [entry for entry in entries if entry.suffix.lower() in _OTHER_IMAGES]
    if other:
        suffixes = ", ".join(sorted({entry.suffix.lower() for entry in other}))
        _warn(
            f"{len(other)} files with {suffixes}, such as {other[0]}, are not read: image files "
            f"are {', '.join(sorted(SUFFIXES))}. Convert them if they are images."
        )


def _warn(message: str) -> None:
    warnings.warn(message, GdfqWarning, stacklevel=2)


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that orders numbers inside names by their value."""
    return [
        (int(part), "") if part.isdecimal() and part.isascii() else (-1, part)
        for part in re.split(r"([0-9]{1,9})", name)
    ]


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(names[:5])
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")
