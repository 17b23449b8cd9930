"""Names of classes, by which folders are recognised."""

import re
from functools import cache
from importlib.resources import files

ClassNames = tuple[tuple[str, ...], ...]
"""For each class, in the order of the outputs, all the names that it has."""


@cache
def imagenet() -> ClassNames:
    """The WordNet ids of the 1,000 classes of ImageNet, in the order that all networks use."""
    text = files("gdfq.data").joinpath("imagenet_ids.txt").read_text(encoding="ascii")
    return tuple((name,) for name in text.split())


def with_imagenet_ids(names: ClassNames) -> ClassNames:
    """Add the WordNet ids to names that are those of ImageNet."""
    ids = imagenet()
    first, last = names[0], names[-1]
    if len(names) != len(ids) or "tench" not in first or "toilet tissue" not in last:
        return names
    return tuple((*own, *ids[i]) for i, own in enumerate(names))


def class_names(values: object) -> ClassNames | None:
    """Names from a list, or from a mapping of indices, as libraries have them.

    A name such as "tench, Tinca tinca" stands for each of its parts. Placeholders such as LABEL_0
    are no names.
    """
    if isinstance(values, dict):
        if sorted(map(str, values), key=lambda key: (len(key), key)) != [
            str(index) for index in range(len(values))
        ]:
            return None
        by_index = {int(index): name for index, name in values.items()}
        values = [by_index[index] for index in range(len(by_index))]
    if not isinstance(values, list | tuple) or not values:
        return None
    if not all(isinstance(name, str) and name for name in values):
        return None
    if all(re.fullmatch(r"(LABEL|class)?[ _-]?[0-9]+", name, re.IGNORECASE) for name in values):
        return None
    split = tuple(
        tuple(dict.fromkeys((name, *(part.strip() for part in name.split(","))))) for name in values
    )
    return with_imagenet_ids(split)


def of_outputs(names: ClassNames | None, classes: int | None) -> ClassNames | None:
    """Return the names if there is one for each of the network's classes.

    Others, such as those of the classes before a last layer was replaced, say nothing about it.
    """
    return names if names is not None and len(names) == classes else None


def normalised(name: str) -> str:
    """A name without what writers differ in: case, spaces, underscores, hyphens."""
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()
