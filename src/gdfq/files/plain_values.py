"""Frozen configurations as plain JSON values, and their fingerprints.

A configuration is a tree of frozen dataclasses, tuples, numbers and strings. Two things are made of
it: values for a reader (`as_values`), which follow the code's present names, and values that
identify the configuration (`frozen_values`, `fingerprint`), which do not: results and checkpoints
that were written years ago must be recognised after any renaming. So each class declares once, with
`tagged`, the names by which it is identified.

A value that is not a dataclass of fields, or that has a shorter name, has a method `plain_value`
that returns its plain value.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, TypeVar

Class = TypeVar("Class", bound=type)

_DIGITS = 12
"""Hexadecimal digits of a fingerprint."""


@dataclass(frozen=True)
class _Tag:
    """How a class is identified.

    Attributes:
        name: Stands for the class.
        renamed: The frozen name of each field that has another name today.
        spellings: The frozen spelling of each string that is spelled otherwise today.
        ignored: Fields that say nothing about the configuration, such as a summary.
        added: Fields that were added later, with the value that stands for how it was before.
    """

    name: str
    renamed: Mapping[str, str] = field(default_factory=dict)
    spellings: Mapping[str, str] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    added: Mapping[str, object] = field(default_factory=dict)


_ATTRIBUTE = "_gdfq_tag"


def tagged(
    name: str,
    *,
    renamed: Mapping[str, str] | None = None,
    spellings: Mapping[str, str] | None = None,
    ignored: tuple[str, ...] = (),
    added: Mapping[str, object] | None = None,
) -> Callable[[Class], Class]:
    """Return a class decorator that freezes the names by which a dataclass is identified.

    Never change a name that was released: every fingerprint of a value of this class would change.

    Args:
        name: Stands for the class, whatever it is called and wherever it lies.
        renamed: For each field that was renamed since, its present name and its frozen one.
        spellings: For each string value that was respelled since, its present spelling and its
            frozen one.
        ignored: Fields that are left out, because they only describe.
        added: Fields that were added since, with the value at which they are left out, because it
            means what was there before.
    """
    tag = _Tag(name, renamed or {}, spellings or {}, frozenset(ignored), added or {})

    def declare(cls: Class) -> Class:
        setattr(cls, _ATTRIBUTE, tag)
        return cls

    return declare


def as_values(value: object) -> Any:
    """Return a configuration as plain JSON values for a reader.

    Each dataclass becomes an object with its tag as "class" and its fields under their present
    names.
    """
    return _plain(value, frozen=False)


def frozen_values(value: object) -> Any:
    """Return a configuration as the plain JSON values that identify it.

    Renaming or moving a class or a field, or changing an ignored field, changes nothing.
    """
    return _plain(value, frozen=True)


def fingerprint(value: object) -> str:
    """Return a short hash of a configuration: that of its `frozen_values`."""
    text = json.dumps(frozen_values(value), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]


def _plain(value: object, *, frozen: bool) -> Any:
    if hasattr(value, "plain_value"):
        return value.plain_value()
    if is_dataclass(value) and not isinstance(value, type):
        return _frozen_object(value) if frozen else _object(value)
    if isinstance(value, tuple | list):
        return [_plain(item, frozen=frozen) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


def _object(value: Any) -> dict[str, Any]:
    tag = _tag_of(value)
    inside = {f.name: as_values(getattr(value, f.name)) for f in fields(value)}
    return {"class": tag.name if tag else type(value).__name__, **inside}


def _frozen_object(value: Any) -> dict[str, Any]:
    cls = type(value)
    tag = _tag_of(value) or _Tag(f"{cls.__module__}.{cls.__qualname__}")
    found: dict[str, Any] = {"class": tag.name}
    for name in (f.name for f in fields(value) if f.name not in tag.ignored):
        if name in tag.added and getattr(value, name) == tag.added[name]:
            continue
        plain = frozen_values(getattr(value, name))
        spelled = tag.spellings.get(plain, plain) if isinstance(plain, str) else plain
        found[tag.renamed.get(name, name)] = spelled
    return found


def _tag_of(value: object) -> _Tag | None:
    """The tag of a value's own class; a subclass is another class."""
    return vars(type(value)).get(_ATTRIBUTE)
