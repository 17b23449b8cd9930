"""The figures of the report: functions of plain values that return a matplotlib figure.

They return None if there is nothing to draw.
"""

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
"""Replaced on the page by the colour of the text, light or dark."""
BLUE, ORANGE, GREEN, GREY = "#3b82c4", "#d9772b", "#3a9a5b", "#8b949e"
"""Readable on white and on black backgrounds."""
_WIDTH, _HEIGHT, _ROW = 5.2, 2.8, 0.19
"""Inches. A phone is about four inches wide on this scale, so labels stay readable."""
_MAX_BARS = 40
_IDS = re.compile(
    r' id="(?:figure|axes|patch|line2d|text|xtick|ytick|matplotlib\.axis|legend|\w+Collection)_\d+"'
)


def svg(figure: Figure) -> str:
    """A figure as SVG text without a background, in the colour of the text of the page."""
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
    """A figure as a PNG on white."""
    _arrange_(figure)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=150, facecolor="white")
    return out.getvalue()


def _arrange_(figure: Figure) -> None:
    """Lay out a figure once, because this takes longer than drawing."""
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


def _integer_ticks(axes: Axes) -> None:
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
    """All losses of a stage by step, on a logarithmic axis if all are positive."""
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
    """The learning rate by step, relative to the first."""
    steps, values = _steps(history, "tune", "rate")
    if len(steps) < 2:
        return None
    figure, axes = _axes(2.2)
    axes.plot(steps, values, color=BLUE)
    axes.set_ylim(bottom=0)
    _label(axes, "step of tune", "learning rate / initial rate")
    return figure


def ranges(history: Sequence[Record], stage: str) -> Figure | None:
    """The range of each activation's grid by step, relative to the range at the end."""
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
    _integer_ticks(axes)
    _label(axes, f"step of {stage}", "range / final range", legend=True)
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
    """The distance of the statistics for each batch norm."""
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
    _integer_ticks(axes)
    _label(axes, "batch norm, from input to output", "distance of statistics", legend=True)
    return figure


def sensitivities(layers: Sequence[Record], kind: str) -> Figure | None:
    """The most sensitive layers, sorted."""
    shown = sorted((r for r in layers if r["sensitivity"]), key=lambda r: -r["sensitivity"])[
        :_MAX_BARS
    ]
    if not shown:
        return None
    figure, axes = _axes(0.8 + _ROW * len(shown))
    axes.barh(
        [_short(r["name"]) for r in shown],
        [r["sensitivity"] for r in shown],
        color=ORANGE,
        height=0.7,
    )
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=8)
    axes.margins(y=0.5 / (len(shown) + 1))
    words = {
        "divergence": "KL divergence of the outputs, this layer alone rounded",
        "error": "error of the layer's output, this layer alone rounded",
    }
    _label(axes, words.get(kind, kind), "")
    return figure


def errors_by_time(timesteps: Sequence[float], errors: Sequence[float]) -> Figure | None:
    """The error of a denoiser's predictions by time step, noise at the left."""
    if not timesteps:
        return None
    figure, axes = _axes()
    axes.plot(timesteps, errors, color=ORANGE, marker=".")
    axes.invert_xaxis()
    axes.set_ylim(bottom=0)
    _label(axes, "time step (noise to image)", "error of the prediction in %")
    return figure


def signal(layers: Sequence[Record]) -> Figure | None:
    """The SQNR of weight and output of each layer, in decibels."""
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
        label="output, with errors of layers before",
    )
    quantized = [(p, r["weight_sqnr"]) for p, r in zip(places, layers, strict=True)]
    points = [(p, v) for p, v in quantized if v is not None]
    axes.plot(*zip(*points, strict=True), "s", color=ORANGE, markersize=3, label="weight")
    _integer_ticks(axes)
    _label(axes, "layer, from input to output", "SQNR, dB", legend=True)
    return figure


def reliability(calibration: Mapping[str, Record]) -> Figure | None:
    """Accuracy by confidence; a calibrated network lies on the diagonal."""
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
    """The change of the accuracy of each class, sorted."""
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
        _label(axes, f"{len(values)} classes, from largest loss to largest gain", "change, points")
    return figure


def pareto(points: Sequence[tuple[str, float, float]], quality: str) -> Figure | None:
    """Quality in percent over size, with a line through the Pareto frontier.

    points: (name, bytes, quality) of each run; a single run is not drawn.
    """
    if len(points) < 2:
        return None
    figure, axes = _axes(3.6)
    axes.scatter([p[1] / 1024 for p in points], [p[2] for p in points], color=BLUE, zorder=3)
    front = frontier(points)
    axes.plot([p[1] / 1024 for p in front], [p[2] for p in front], color=ORANGE, linewidth=1.2)
    names: dict[tuple[float, float], list[str]] = {}
    for name, *position in points:  # equal runs share a label
        names.setdefault((position[0], position[1]), []).append(_short(name))
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
    """The Pareto frontier, by size: no other point is both smaller and better."""
    best: list[tuple[str, float, float]] = []
    for point in sorted(points, key=lambda p: (p[1], -p[2])):
        if not best or point[2] > best[-1][2]:
            best.append(point)
    return best


def _short(name: str, length: int = 36) -> str:
    name = name.replace("$", r"\$")  # else matplotlib reads a formula
    return name if len(name) <= length else f"…{name[1 - length :]}"
