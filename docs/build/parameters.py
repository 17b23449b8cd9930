"""Lists the parameters that a docstring describes: in the source they are lines `name: what it is`.

An extension of griffe, which reads the docstrings for the site; see `mkdocs.yml`.
"""

import re
from typing import Any

import griffe


def listed(text: str, known: set[str]) -> str:
    """The docstring with each paragraph of known names made a Markdown list.

    A description's further lines are indented by four spaces, as a list item's are.
    """

    def item(found: re.Match[str]) -> str:
        names = found[1].split(", ")
        if not known.issuperset(names):
            return found[0]
        return f"- {', '.join(f'`{name}`' for name in names)}: "

    return re.sub(r"^([a-z_]\w*(?:, [a-z_]\w*)*): ", item, text, flags=re.MULTILINE)


class Parameters(griffe.Extension):
    """What functions take and what classes hold."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        self._list(func, {parameter.name for parameter in func.parameters})

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        self._list(cls, set(cls.members))

    def _list(self, of: griffe.Object, known: set[str]) -> None:
        if of.docstring is not None:
            of.docstring.value = listed(of.docstring.value, known)
