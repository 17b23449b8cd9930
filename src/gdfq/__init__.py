"""Make a trained neural network small and fast when its training data cannot be had.

    quantize    a network without its data -> a QuantizedNetwork
    generate    synthetic images alone
    load        a quantized network that was saved
    capture     a network as a graph, to be captured once and quantized several times

The names of this module are imported when they are first used, so that `import gdfq` does not wait
for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from gdfq.version import __version__

if TYPE_CHECKING:
    from gdfq.api import generate, load, quantize
    from gdfq.deploy.export import Exported
    from gdfq.errors import GdfqDeprecationWarning, GdfqError, GdfqWarning, UsageError
    from gdfq.graph.capture import Captured, capture
    from gdfq.quantized import QuantizedNetwork
    from gdfq.recipes import RECIPES, Recipe
    from gdfq.report import write_report

_HOME = {
    "Captured": "gdfq.graph.capture",
    "Exported": "gdfq.deploy.export",
    "GdfqDeprecationWarning": "gdfq.errors",
    "GdfqError": "gdfq.errors",
    "GdfqWarning": "gdfq.errors",
    "QuantizedNetwork": "gdfq.quantized",
    "RECIPES": "gdfq.recipes",
    "Recipe": "gdfq.recipes",
    "UsageError": "gdfq.errors",
    "capture": "gdfq.graph.capture",
    "generate": "gdfq.api",
    "load": "gdfq.api",
    "quantize": "gdfq.api",
    "write_report": "gdfq.report",
}
"""The module that each public name is imported from."""

__all__ = [
    "RECIPES",
    "Captured",
    "Exported",
    "GdfqDeprecationWarning",
    "GdfqError",
    "GdfqWarning",
    "QuantizedNetwork",
    "Recipe",
    "UsageError",
    "__version__",
    "capture",
    "generate",
    "load",
    "quantize",
    "write_report",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'gdfq' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
