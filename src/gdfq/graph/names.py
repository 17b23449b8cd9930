"""Names of tensors in graphs: the network's own, where a graph can hold them.

A graph's tensors are attributes of nested modules. Their names stand in the code that `torch.fx`
writes and in files. `nn.Module` allows more: hyphens, keywords, names of its own methods.
"""

import re
from collections.abc import Iterable
from keyword import iskeyword

from torch import fx

_RESERVED = frozenset(dir(fx.GraphModule)) | frozenset(dir(type))
"""Attributes of the module that holds a graph and of the modules inside it, and of their class."""
_FOREIGN = re.compile(r"[^A-Za-z0-9_]")


def safe_paths(paths: Iterable[str]) -> dict[str, str]:
    """Return a name for each dotted path of a network's tensors that a graph can hold.

    Names that a graph can hold stay as they are. In others, each part that it cannot hold changes:
    foreign characters become underscores, keywords and attributes of modules get one at their end,
    and so does what would be equal to the name of a sibling.
    """
    paths = list(paths)
    children: dict[str, dict[str, str]] = {}
    for path in paths:
        parent = ""
        for part in path.split("."):
            children.setdefault(parent, {})[part] = ""
            parent = f"{parent}.{part}"
    for siblings in children.values():
        taken: set[str] = set()
        for part in sorted(siblings, key=lambda part: _safe(part) != part):
            safe = _safe(part)
            while safe in taken:
                safe += "_"
            taken.add(safe)
            siblings[part] = safe
    safe_of = {}
    for path in paths:
        parent, parts = "", []
        for part in path.split("."):
            parts.append(children[parent][part])
            parent = f"{parent}.{part}"
        safe_of[path] = ".".join(parts)
    return safe_of


def _safe(part: str) -> str:
    safe = _FOREIGN.sub("_", part)
    while iskeyword(safe) or safe in _RESERVED:
        safe += "_"
    return safe
