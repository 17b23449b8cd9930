"""The report's figures. Each is a function of plain values that returns a matplotlib figure."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gdfq.report.read import Record

_INK = "#24292f"
"""What is drawn in it takes the text's colour on the page, light or dark."""
BLUE, ORANGE, GREEN, GREY = "#3b82c4", "#d9772b", "#3a9a5b", "#8b949e"
"""Readable on white and on black."""
_WIDTH, _HEIGHT, _ROW = 5.2, 2.8, 0.19
"""Inches. A page shows an inch as a quarter of a phone's width, so that labels stay readable."""
_MOST_ROWS = 40
_IDS = re.compile(
    r' id="(?:figure|axes|patch|line2d|text|xtick|ytick|matplotlib\.axis|legend|\w+Collection)_\d+"'
)


def svg(figure: Figure) -> str:
    """A figure for a page: without a background, in the colour of the text around it."""
    _arrange_(figure)
    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "gdfq"}):
        figure.savefig(out, format="svg", transparent=True, metadata=dict.fromkeys(_METADATA))
    text = out.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    text = re.sub(r'<svg ([^>]*?)height="[\d.]+pt"([^>]*?) width="[\d.]+pt"', r"<svg \1\2", text)
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 inherit", text)
    return _COMMENTS.sub("", _IDS.sub("", text))


_COMMENTS = re.compile("<!--.*?-->", re.DOTALL)
_METADATA = ("Date", "Creator", "Format", "Type")


def png(figure: Figure) -> bytes:
    """A figure as a picture on white."""
    _arrange_(figure)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=150, facecolor="white")
    return out.getvalue()


def _arrange_(figure: Figure) -> None:
    """Make room for the labels, once: it takes longer than drawing."""
    engine = figure.get_layout_engine()
    if engine is not None:
        FigureCanvasAgg(figure)
        engine.execute(figure)
        figure.set_layout_engine("none")


def _axes(height: float = _HEIGHT) -> tuple[Figure, Axes]:
    figure = Figure((_WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_INK)
    axes.tick_params(colors=_INK, labelsize=9)
    axes.grid(True, color=GREY, alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _whole_steps(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _label(axes: Axes, x: str, y: str, *, legend: bool = False) -> None:
    axes.set_xlabel(x, color=_INK, fontsize=9)
    axes.set_ylabel(y, color=_INK, fontsize=9)
    if legend:
        axes.legend(fontsize=8, labelcolor=_INK, framealpha=0, loc="best")


def _steps(history: Sequence[Record], stage: str, name: str) -> tuple[list[float], list[float]]:
    found = [r for r in history if r["stage"] == stage and name in r]
    return [float(r["step"]) for r in found], [float(r[name]) for r in found]


_NOT_LOSSES = {"stage", "step", "rate", "ranges"}


def losses(history: Sequence[Record], stage: str) -> Figure | None:
    """All losses of a stage over its steps, on a logarithmic axis where they allow it."""
    names = list(
        dict.fromkeys(n for r in history if r["stage"] == stage for n in r if n not in _NOT_LOSSES)
    )
    curves = {name: _steps(history, stage, name) for name in names}
    if not any(len(steps) > 1 for steps, _ in curves.values()):
        return None
    figure, axes = _axes()
    for name, (steps, values) in curves.items():
        axes.plot(steps, values, label=name, linewidth=1.2)
    if all(value > 0 for _, values in curves.values() for value in values):
        axes.set_yscale("log")
    _label(axes, f"step of {stage}", "loss", legend=True)
    return figure


def rates(history: Sequence[Record]) -> Figure | None:
    """The learning rate over the steps, as a share of the first."""
    steps, values = _steps(history, "tune", "rate")
    if len(steps) < 2:
        return None
    figure, axes = _axes(2.2)
    axes.plot(steps, values, color=BLUE)
    axes.set_ylim(bottom=0)
    _label(axes, "step of tune", "share of the rate")
    return figure


def ranges(history: Sequence[Record], stage: str) -> Figure | None:
    """How much each activation's grid spans, as a part of what it spans at the end."""
    found = [r for r in history if r["stage"] == stage and r.get("ranges")]
    if len(found) < 2:
        return None
    last = found[-1]["ranges"]
    figure, axes = _axes()
    steps = [float(r["step"]) for r in found]
    table = np.array(
        [[float(r["ranges"][name]) / (last[name] or 1) for name in last] for r in found]
    )
    axes.plot(steps, table, color=BLUE, alpha=0.25, linewidth=0.8)
    axes.plot(steps, np.median(table, 1), color=ORANGE, linewidth=1.8, label="median")
    _whole_steps(axes)
    _label(axes, f"step of {stage}", "range / last range", legend=True)
    return figure


def stages(seconds: Mapping[str, float]) -> Figure | None:
    """Seconds of each stage."""
    shown = {name: value for name, value in seconds.items() if name != "total"}
    if not shown:
        return None
    figure, axes = _axes(0.7 + 0.28 * len(shown))
    bars = axes.barh(list(shown), list(shown.values()), color=BLUE, height=0.6)
    axes.bar_label(bars, fmt=" %.1f s", color=_INK, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    _label(axes, "seconds", "")
    return figure


def distances(found: Sequence[Record]) -> Figure | None:
    """By layer, how far statistics are from the batch norms'."""
    if not found:
        return None
    figure, axes = _axes()
    places = range(1, len(found) + 1)
    for kind, colour, label in (
        ("white", GREY, "white noise"),
        ("natural", ORANGE, "1/f noise"),
        ("synthetic", BLUE, "the images"),
    ):
        values = [max(d[kind], 1e-6) for d in found]
        axes.plot(places, values, "o-", color=colour, label=label, markersize=3, linewidth=1.2)
    axes.set_yscale("log")
    _whole_steps(axes)
    _label(axes, "batch norm, from input to output", "distance of statistics", legend=True)
    return figure


def harms(layers: Sequence[Record], kind: str) -> Figure | None:
    """The most harmful layers, the worst on top."""
    shown = sorted((r for r in layers if r["harm"]), key=lambda r: -r["harm"])[:_MOST_ROWS]
    if not shown:
        return None
    figure, axes = _axes(0.8 + _ROW * len(shown))
    axes.barh(
        [_short(r["name"]) for r in shown], [r["harm"] for r in shown], color=ORANGE, height=0.7
    )
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=8)
    axes.margins(y=0.5 / (len(shown) + 1))
    words = {
        "divergence": "divergence of the outputs with this layer alone rounded",
        "error": "error of the layer's output with it alone rounded",
    }
    _label(axes, words.get(kind, kind), "")
    return figure


def signal(layers: Sequence[Record]) -> Figure | None:
    """How much of the signal is left behind each layer, in order, in decibels."""
    if not layers:
        return None
    figure, axes = _axes()
    places = list(range(1, len(layers) + 1))
    axes.plot(
        places,
        [r["output_sqnr"] for r in layers],
        "o-",
        color=BLUE,
        markersize=3,
        label="output, all errors so far",
    )
    quantized = [(p, r["weight_sqnr"]) for p, r in zip(places, layers, strict=True)]
    points = [(p, v) for p, v in quantized if v is not None]
    axes.plot(*zip(*points, strict=True), "s", color=ORANGE, markersize=3, label="weight")
    _whole_steps(axes)
    _label(axes, "layer, from input to output", "SQNR, dB", legend=True)
    return figure


def reliability(calibration: Mapping[str, Record]) -> Figure | None:
    """Accuracy over confidence, before and after; a calibrated network lies on the diagonal."""
    figure, axes = _axes(3.2)
    axes.plot([0, 1], [0, 1], "--", color=GREY, linewidth=1)
    for who, colour in (("teacher", BLUE), ("student", ORANGE)):
        bins = calibration[who]
        points = [
            (confidence, accuracy)
            for count, accuracy, confidence in zip(
                bins["counts"], bins["accuracy"], bins["confidence"], strict=True
            )
            if count
        ]
        label = f"{who}: ECE {bins['ece']:.2f} %"
        axes.plot(*zip(*points, strict=True), "o-", color=colour, label=label, markersize=4)
    _label(axes, "confidence", "accuracy", legend=True)
    return figure


def class_changes(by_class: Sequence[Sequence[Any]]) -> Figure | None:
    """The change of each class's accuracy, sorted."""
    if not by_class:
        return None
    changes = sorted((after - before, label) for label, _, before, after in by_class)
    figure, axes = _axes(2.6)
    values = [change for change, _ in changes]
    colours = [GREEN if value >= 0 else ORANGE for value in values]
    axes.bar(range(len(values)), values, color=colours, width=0.8)
    axes.axhline(0, color=_INK, linewidth=0.8)
    if len(values) <= 20:
        axes.set_xticks(range(len(values)), [str(label) for _, label in changes])
        _label(axes, "class", "change, points")
    else:
        axes.set_xticks([])
        _label(axes, f"{len(values)} classes, from most lost to most won", "change, points")
    return figure


def pareto(points: Sequence[tuple[str, float, float]], quality: str) -> Figure | None:
    """Quality in percent over size: (name, bytes, quality) of each run.

    What no other beats is joined. One run alone is no comparison, so it is not drawn.
    """
    if len(points) < 2:
        return None
    figure, axes = _axes(3.6)
    axes.scatter([p[1] / 1024 for p in points], [p[2] for p in points], color=BLUE, zorder=3)
    front = frontier(points)
    axes.plot([p[1] / 1024 for p in front], [p[2] for p in front], color=ORANGE, linewidth=1.2)
    names: dict[tuple[float, float], list[str]] = {}
    for name, *spot in points:  # runs that are equal share a place
        names.setdefault((spot[0], spot[1]), []).append(_short(name))
    for (size, value), together in names.items():
        axes.annotate(
            ", ".join(together),
            (size / 1024, value),
            (5, 5),
            textcoords="offset points",
            fontsize=8,
            color=_INK,
        )
    axes.margins(0.15)
    axes.set_ylim(top=min(axes.get_ylim()[1], 100))
    _label(axes, "size, KiB", quality)
    return figure


def frontier(points: Sequence[tuple[str, float, float]]) -> list[tuple[str, float, float]]:
    """The points that no other beats in both size (less) and quality (more), by size."""
    best: list[tuple[str, float, float]] = []
    for point in sorted(points, key=lambda p: (p[1], -p[2])):
        if not best or point[2] > best[-1][2]:
            best.append(point)
    return best


def _short(name: str, length: int = 36) -> str:
    name = name.replace("$", r"\$")  # matplotlib reads formulas
    return name if len(name) <= length else f"…{name[1 - length :]}"
