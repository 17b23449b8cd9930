"""Draws docs/results.svg, the picture of the README, from the rows under benchmarks/results.

python -m benchmarks.readme_picture

It shows top-1 of the recipe `fast` without data and full precision, for every shared network and
bit width. A bit width without a row is shown as not measured.
"""

import argparse
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from support.places import RESULTS, ROOT

PICTURE = ROOT / "docs" / "results.svg"
STEPS = 2400  # of `fast` in full; shorter runs are other rows
PLACEMENT = "relu"
BITS = ("w8a8", "w4a4", "w3a3", "w2a2")
TITLES = {
    "cifar10_resnet20": "CIFAR-10, ResNet-20",
    "cifar100_resnet56": "CIFAR-100, ResNet-56",
    "imagenet_mobilenetv1_025": "ImageNet (1,000 images), MobileNetV1 x0.25",
}

_LEFT, _BAR_WIDTH, _RIGHT = 130, 400, 190  # pixels: labels, 0 to 100 %, values
_ROW_HEIGHT, _BAR_HEIGHT, _GROUP_GAP = 20, 12, 14
_INK, _PALE, _FULL, _QUANTIZED = "#222222", "#767676", "#9aa5b1", "#00796b"


@dataclass(frozen=True)
class Bar:
    """One network at one bit width.

    Args:
        label: "full precision" or the bits.
        top1: percent, the mean over seeds; None if there is no row.
        low, high: percent, the 95 % interval of the drop over test images around `top1`.
        seeds: how many rows the mean is of; 0 for full precision.
        deviation: percent, the standard deviation over seeds; None for fewer than two.
    """

    label: str
    top1: float | None
    low: float = 0.0
    high: float = 0.0
    seeds: int = 0
    deviation: float | None = None


def bars(rows: Sequence[dict[str, Any]], network: str) -> list[Bar]:
    """Full precision and each bit width of a network, in this order."""
    chosen = [
        row
        for row in rows
        if (row["network"], row["recipe"], row["steps"]) == (network, "fast", STEPS)
        and row["placement"] == PLACEMENT
    ]
    full = chosen[0]["teacher"]["all"]
    found = [Bar("full precision", full)]
    for bits in BITS:
        group = [row for row in chosen if row["bits"] == bits]
        if not group:
            found.append(Bar(bits, None))
            continue
        values = [row["student"]["all"] for row in group]
        top1 = statistics.mean(values)
        deviation = statistics.stdev(values) if len(values) > 1 else None
        least, most = (
            statistics.mean(row["drop_interval"][end] for row in group) for end in (0, 1)
        )
        found.append(Bar(bits, top1, full - most, full - least, len(group), deviation))
    return found


def picture(rows: Sequence[dict[str, Any]]) -> str:
    """The picture as SVG: a group of bars for each network, on an axis from 0 to 100 %."""
    y, parts = 8, []
    for network, title in TITLES.items():
        y += _ROW_HEIGHT
        parts.append(_text(_LEFT, y - 6, title, weight="bold"))
        for bar in bars(rows, network):
            parts += _drawn(bar, y)
            y += _ROW_HEIGHT
        y += _GROUP_GAP
    caption = (
        "Top-1 in %, recipe fast, no data, weights and ReLU outputs quantized.",
        "Lines: 95 % interval over test images. ±: standard deviation over seeds.",
    )
    for line in caption:
        y += 14
        parts.append(_text(8, y, line, size=11, fill=_PALE))
    width, height = _LEFT + _BAR_WIDTH + _RIGHT, y + 10
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" font-family="Helvetica, Arial, sans-serif">\n'
        "<title>Accuracy without data and in full precision</title>\n"
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>'
    )
    return "\n".join([head, *parts, "</svg>"]) + "\n"


def _drawn(bar: Bar, y: int) -> Iterable[str]:
    """A label, a bar with its interval, and the value."""
    middle = y + _ROW_HEIGHT // 2
    yield _text(_LEFT - 8, middle + 4, bar.label, anchor="end")
    if bar.top1 is None:
        yield _text(_LEFT + 4, middle + 4, "not measured", size=11, fill=_PALE)
        return
    color = _QUANTIZED if bar.seeds else _FULL
    yield (
        f'<rect x="{_LEFT}" y="{middle - _BAR_HEIGHT // 2}" width="{_x(bar.top1) - _LEFT:.1f}" '
        f'height="{_BAR_HEIGHT}" fill="{color}"/>'
    )
    if bar.seeds:
        yield (
            f'<path d="M{_x(bar.low):.1f} {middle}H{_x(bar.high):.1f}M{_x(bar.low):.1f} {middle - 4}v8'
            f'M{_x(bar.high):.1f} {middle - 4}v8" stroke="{_INK}" fill="none"/>'
        )
    seeds = f" ({bar.seeds} seed{'s' * (bar.seeds > 1)})" if bar.seeds else ""
    spread = "" if bar.deviation is None else f" ± {bar.deviation:.2f}"
    value_x = _x(max(bar.top1, bar.high)) + 8
    yield _text(value_x, middle + 4, f"{bar.top1:.2f}{spread}{seeds}")


def _x(percent: float) -> float:
    return _LEFT + _BAR_WIDTH * percent / 100


def _text(
    x: float,
    y: float,
    text: str,
    *,
    size: int = 12,
    fill: str = _INK,
    anchor: str = "start",
    weight: str = "normal",
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y}" font-size="{size}" fill="{fill}" text-anchor="{anchor}" '
        f'font-weight="{weight}">{text}</text>'
    )


def read_rows() -> list[dict[str, Any]]:
    """All rows of accuracy."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*-s*.json"))]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.readme_picture", description=__doc__.partition("\n")[0]
    )
    parser.parse_args()
    PICTURE.write_text(picture(read_rows()))
    print(f"wrote {PICTURE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
