"""Make a trained neural network small and fast when its training data cannot be had.

The names below are loaded when first used, so that `import gdfq` (and with it
`gdfq --help`) does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from gdfq.version import __version__

if TYPE_CHECKING:
    from gdfq.deploy.export import Exported
    from gdfq.errors import GdfqError, UsageError
    from gdfq.making import generate
    from gdfq.pipeline import quantize
    from gdfq.quantized import QuantizedNetwork, load
    from gdfq.recipes import RECIPES, Recipe
    from gdfq.report import write_report

_HOME = {
    "Exported": "gdfq.deploy.export",
    "GdfqError": "gdfq.errors",
    "UsageError": "gdfq.errors",
    "generate": "gdfq.making",
    "quantize": "gdfq.pipeline",
    "QuantizedNetwork": "gdfq.quantized",
    "load": "gdfq.quantized",
    "RECIPES": "gdfq.recipes",
    "Recipe": "gdfq.recipes",
    "write_report": "gdfq.report",
}

__all__ = [
    "RECIPES",
    "Exported",
    "GdfqError",
    "QuantizedNetwork",
    "Recipe",
    "UsageError",
    "__version__",
    "generate",
    "load",
    "quantize",
    "write_report",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'gdfq' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
