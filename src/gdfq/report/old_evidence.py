"""Evidence of older versions, converted to the keys of the current one."""

from collections.abc import Mapping
from typing import Any

_RENAMED_SINCE_1: Mapping[str, Mapping[str, str]] = {
    "layers": {"harm": "sensitivity", "least": "minimum", "greatest": "maximum"},
    "images": {"answered": "predicted", "as_meant": "as_labelled"},
    "test": {"won": "gained", "moved": "still_wrong", "answer": "prediction"},
}
"""Old and new keys at any depth of a section of version 1."""


def converted_from_1(document: Mapping[str, Any]) -> dict[str, Any]:
    """Evidence of version 1 with the keys of version 2."""
    return {
        name: _renamed(section, _RENAMED_SINCE_1.get(name, {}))
        for name, section in document.items()
    }


def _renamed(value: Any, names: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {names.get(key, key): _renamed(part, names) for key, part in value.items()}
    if isinstance(value, list):
        return [_renamed(part, names) for part in value]
    return value
