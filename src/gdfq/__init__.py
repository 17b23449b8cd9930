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
    from gdfq.analysis.language import LanguageMeasures
    from gdfq.analysis.samples import SampleComparison
    from gdfq.api import compare_samples, generate, load, quantize
    from gdfq.data.preprocessing import Resize
    from gdfq.data.vocabulary import Vocabulary
    from gdfq.deploy.export import TARGETS, Exported
    from gdfq.deploy.target import Target
    from gdfq.errors import GdfqDeprecationWarning, GdfqError, GdfqWarning, UsageError
    from gdfq.execution.budget import MemoryBudget
    from gdfq.execution.context import Context
    from gdfq.files.plain_values import fingerprint, tagged
    from gdfq.generation.generation import Generation
    from gdfq.graph.capture import Captured, capture
    from gdfq.graph.inputs import InputSpec
    from gdfq.optim import AdamConfig, Cosine, SgdConfig, StepDecay
    from gdfq.quantized import QuantizedNetwork
    from gdfq.quantizers.family import ADAROUND, LSQ, MINMAX, TOKENS, QuantizerFamily
    from gdfq.recipes import RECIPES, Recipe
    from gdfq.report import write_report
    from gdfq.sources.base import Batch, Source
    from gdfq.sources.generator import GeneratorSource
    from gdfq.sources.latent import LatentSource
    from gdfq.sources.own_text import OwnText, Sampling
    from gdfq.sources.patches import PatchSource
    from gdfq.sources.pixels import OptimisedSource
    from gdfq.sources.pool import ImagePool
    from gdfq.sources.spectral import SpectralSource
    from gdfq.tuning.base import NO_TUNING, Tuning
    from gdfq.tuning.distill import Distillation
    from gdfq.tuning.grid_adam import GridAdam
    from gdfq.tuning.reconstruct import Reconstruction

_HOME = {
    "ADAROUND": "gdfq.quantizers.family",
    "AdamConfig": "gdfq.optim",
    "Batch": "gdfq.sources.base",
    "Captured": "gdfq.graph.capture",
    "Context": "gdfq.execution.context",
    "Cosine": "gdfq.optim",
    "Distillation": "gdfq.tuning.distill",
    "Exported": "gdfq.deploy.export",
    "GdfqDeprecationWarning": "gdfq.errors",
    "GdfqError": "gdfq.errors",
    "GdfqWarning": "gdfq.errors",
    "Generation": "gdfq.generation.generation",
    "GeneratorSource": "gdfq.sources.generator",
    "GridAdam": "gdfq.tuning.grid_adam",
    "ImagePool": "gdfq.sources.pool",
    "InputSpec": "gdfq.graph.inputs",
    "LSQ": "gdfq.quantizers.family",
    "LanguageMeasures": "gdfq.analysis.language",
    "LatentSource": "gdfq.sources.latent",
    "MINMAX": "gdfq.quantizers.family",
    "MemoryBudget": "gdfq.execution.budget",
    "NO_TUNING": "gdfq.tuning.base",
    "OptimisedSource": "gdfq.sources.pixels",
    "OwnText": "gdfq.sources.own_text",
    "PatchSource": "gdfq.sources.patches",
    "QuantizedNetwork": "gdfq.quantized",
    "QuantizerFamily": "gdfq.quantizers.family",
    "RECIPES": "gdfq.recipes",
    "Recipe": "gdfq.recipes",
    "Reconstruction": "gdfq.tuning.reconstruct",
    "Resize": "gdfq.data.preprocessing",
    "SampleComparison": "gdfq.analysis.samples",
    "Sampling": "gdfq.sources.own_text",
    "SgdConfig": "gdfq.optim",
    "Source": "gdfq.sources.base",
    "SpectralSource": "gdfq.sources.spectral",
    "StepDecay": "gdfq.optim",
    "TARGETS": "gdfq.deploy.export",
    "TOKENS": "gdfq.quantizers.family",
    "Target": "gdfq.deploy.target",
    "Tuning": "gdfq.tuning.base",
    "UsageError": "gdfq.errors",
    "Vocabulary": "gdfq.data.vocabulary",
    "capture": "gdfq.graph.capture",
    "compare_samples": "gdfq.api",
    "fingerprint": "gdfq.files.plain_values",
    "generate": "gdfq.api",
    "load": "gdfq.api",
    "quantize": "gdfq.api",
    "tagged": "gdfq.files.plain_values",
    "write_report": "gdfq.report",
}
"""The module that each public name is imported from."""

__all__ = [
    "ADAROUND",
    "LSQ",
    "MINMAX",
    "NO_TUNING",
    "RECIPES",
    "TARGETS",
    "TOKENS",
    "AdamConfig",
    "Batch",
    "Captured",
    "Context",
    "Cosine",
    "Distillation",
    "Exported",
    "GdfqDeprecationWarning",
    "GdfqError",
    "GdfqWarning",
    "Generation",
    "GeneratorSource",
    "GridAdam",
    "ImagePool",
    "InputSpec",
    "LanguageMeasures",
    "LatentSource",
    "MemoryBudget",
    "OptimisedSource",
    "OwnText",
    "PatchSource",
    "QuantizedNetwork",
    "QuantizerFamily",
    "Recipe",
    "Reconstruction",
    "Resize",
    "SampleComparison",
    "Sampling",
    "SgdConfig",
    "Source",
    "SpectralSource",
    "StepDecay",
    "Target",
    "Tuning",
    "UsageError",
    "Vocabulary",
    "__version__",
    "capture",
    "compare_samples",
    "fingerprint",
    "generate",
    "load",
    "quantize",
    "tagged",
    "write_report",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'gdfq' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
