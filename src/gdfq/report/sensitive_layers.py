"""Layers that are far more sensitive than others, and the option that gives them more bits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from gdfq.functional.grid import MAX_BITS
from gdfq.report.read import Record, number
from gdfq.student.scheme import LayerBits

_MIN_SHARE = 0.05
"""Smallest share of the sum of all sensitivities."""
_MIN_MEDIAN_RATIO = 3.0
"""Smallest sensitivity relative to the median."""
_MAX_LAYERS = 3
"""Most layers that are named."""

SENSITIVITY_NAMES: Mapping[str, str] = {
    "divergence": "the total sensitivity",
    "error": "the sum of all layers' own errors",
}
"""What a layer has a share of, by `gdfq.analysis.sensitivity.Sensitivity.kind`."""


@dataclass(frozen=True)
class SensitiveLayer:
    """A layer that is far more sensitive than others.

    Attributes:
        name: Its name.
        share: Its share of the sum of all sensitivities, in percent.
        option: The command-line option that gives it more bits.
        bytes: Bytes that the option adds to the file.
    """

    name: str
    share: float
    option: str
    bytes: int


def sensitive_layers(layers: Sequence[Record]) -> tuple[SensitiveLayer, ...]:
    """The layers that are far more sensitive than others, the most sensitive first."""
    values = [(layer, number(layer.get("sensitivity")) or 0.0) for layer in layers]
    total, middle = sum(v for _, v in values), median([v for _, v in values] or [0.0])
    largest = sorted(values, key=lambda pair: -pair[1])[:_MAX_LAYERS]
    return tuple(
        _with_option(layer, 100 * value / total)
        for layer, value in largest
        if value > 0 and value >= _MIN_SHARE * total and value >= _MIN_MEDIAN_RATIO * middle
    )


def _with_option(layer: Record, share: float) -> SensitiveLayer:
    bits = int(layer["bits"])
    more = MAX_BITS if bits < MAX_BITS else None
    layer_bits = LayerBits(LayerBits.exactly(layer["name"], MAX_BITS).pattern, more)
    added = int(layer["weights"]) * ((more or 32) - bits) // 8
    return SensitiveLayer(layer["name"], share, f"--layer-bits '{layer_bits}'", added)
