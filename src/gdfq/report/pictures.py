"""Small images within the page: pixels as data URIs, histograms as SVG paths."""

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

_WIDTH, _HEIGHT = 96, 24
"""Size of a histogram in SVG units."""


def data_uri(pixels: np.ndarray[Any, Any]) -> str:
    """Pixels uint8 [C, H, W], C 1 or 3, as a PNG in a data URI."""
    image = Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
    out = io.BytesIO()
    image.save(out, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def histogram_path(counts: Sequence[float]) -> str:
    """The outline of a histogram as an SVG path of 96 x 24 units.

    Heights are square roots of the counts, so that small counts are visible.
    """
    heights = np.sqrt(np.asarray(counts, float))
    heights = heights / max(float(heights.max()), 1e-12) * _HEIGHT
    step = _WIDTH / len(heights)
    tops = "".join(f"V{_HEIGHT - h:.1f}h{step:.2f}" for h in heights)
    return f"M0 {_HEIGHT}{tops}V{_HEIGHT}z"


def place(value: float, ends: Sequence[float]) -> float:
    """The x coordinate of a value in a histogram between two ends, clipped to its sides."""
    low, high = ends
    share = (value - low) / (high - low) if high > low else 0.5
    return round(_WIDTH * min(1.0, max(0.0, share)), 1)
