"""What a network returns: one tensor, or tensors in tuples, lists and dictionaries.

Inside the package a network's graph returns its tensors in order: the tensor itself where there is
one, else a tuple. `Structure` describes the form in which the user's network returned them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from gdfq.errors import UsageError

Structure = None | int | list["Structure"] | dict[str, "Structure"]
"""The place of a tensor in the flat order, or what holds such places. Tuples count as lists.

None is where a network returns None: auxiliary outputs that are for training, say."""


def flattened(value: object) -> list[Tensor]:
    """Return all tensors of a network's output, in order.

    Raises:
        UsageError: The output contains anything else.
    """
    if value is None:
        return []
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [tensor for part in value.values() for tensor in flattened(part)]
    if isinstance(value, tuple | list):
        return [tensor for part in value for tensor in flattened(part)]
    raise UsageError(
        "a network must return a tensor, or tuples, lists and dictionaries of tensors; "
        f"it returned a {type(value).__name__}. Wrap it so that it returns its tensors alone."
    )


def structure_of(value: object) -> Structure:
    """Return the structure of a network's output, which `flattened` accepts."""
    places = iter(range(len(flattened(value))))

    def structure(part: object) -> Structure:
        if part is None:
            return None
        if isinstance(part, Tensor):
            return next(places)
        if isinstance(part, Mapping):
            if len({str(name) for name in part}) < len(part):
                raise UsageError(
                    "the keys of a dictionary of outputs must differ as text; got "
                    f"{', '.join(map(repr, part))}. Rename them."
                )
            return {str(name): structure(inner) for name, inner in part.items()}
        assert isinstance(part, Sequence)
        return [structure(inner) for inner in part]

    return structure(value)


def built(structure: Structure, tensors: Sequence[Tensor]) -> Any:
    """Return the tensors in the form of the user's network (a list becomes a tuple)."""
    if structure is None:
        return None
    if isinstance(structure, int):
        return tensors[structure]
    if isinstance(structure, dict):
        return {name: built(inner, tensors) for name, inner in structure.items()}
    return tuple(built(inner, tensors) for inner in structure)


def in_order(value: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors that a graph of the package returned, in order."""
    return [value] if isinstance(value, Tensor) else list(value)


def in_parts(network: Callable[..., Any], inputs: Sequence[Tensor], at_once: int) -> Any:
    """Return what a network returns for a batch that passes in parts.

    Args:
        network: Returns a tensor [n, ...], or several in order.
        inputs: A tensor [N, *shape] for each input.
        at_once: Maximum number of entries of a part.

    Returns:
        A tensor [N, ...], or several in order.
    """
    parts = zip(*(tensor.split(at_once) for tensor in inputs), strict=True)
    found = [network(*part) for part in parts]
    if len(found) == 1:
        return found[0]
    if isinstance(found[0], Tensor):
        return torch.cat(found)
    return tuple(map(torch.cat, zip(*found, strict=True)))


def names_of(structure: Structure, single: str) -> list[str]:
    """Return each tensor's name, such as `boxes` or `levels.0`; `single` for a lone tensor."""

    def walk(part: Structure, path: tuple[str, ...]) -> Iterator[tuple[int, str]]:
        if part is None:
            return
        if isinstance(part, int):
            yield part, ".".join(path) or single
            return
        items = part.items() if isinstance(part, dict) else enumerate(part)
        for key, inner in items:
            yield from walk(inner, (*path, str(key)))

    paths = [path for _, path in sorted(walk(structure, ()))]
    if len(paths) == 1:
        return [single]
    names: list[str] = []
    for path in paths:
        # Numbers are not valid names, and the input has a name of its own.
        name = f"output.{path}" if path[0].isdigit() or path == "images" else path
        while name in names:
            name += "_"
        names.append(name)
    return names


class HasOutputs(Protocol):
    """A network or a description of it, with its classes and outputs."""

    @property
    def classes(self) -> int | None: ...

    @property
    def outputs(self) -> Structure: ...


def count_of(structure: Structure) -> int:
    """Return the number of tensors in a structure."""
    if structure is None:
        return 0
    if isinstance(structure, int):
        return 1
    return sum(map(count_of, structure.values() if isinstance(structure, dict) else structure))


def read_structure(value: object) -> Structure:
    """Read a structure from a file.

    Raises:
        ValueError: It does not place each tensor once, in order.
    """
    places: list[int] = []

    def read(part: object, depth: int) -> Structure:
        if depth > 16:
            raise ValueError("outputs are nested too deeply")
        if part is None:
            return None
        if isinstance(part, bool) or not isinstance(part, int | list | dict):
            raise ValueError(f"an output's place cannot be {part!r}")
        if isinstance(part, int):
            places.append(part)
            return part
        if isinstance(part, list):
            return [read(inner, depth + 1) for inner in part]
        return {str(name): read(inner, depth + 1) for name, inner in part.items()}

    structure = read(value, 0)
    if not places or places != list(range(len(places))):
        raise ValueError(f"outputs cannot be placed as {places}")
    return structure
