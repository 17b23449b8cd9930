"""What a user got, in one sentence, with what it rests on and what to do next."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from gdfq.functional.grid import MAX_BITS
from gdfq.report.read import Record, Run, number
from gdfq.student.scheme import LayerBits

Level = Literal["good", "fair", "poor", "unknown"]

_GOOD, _FAIR = 0.01, 0.05
"""Parts of the accuracy that may be lost. 1 % is what MLPerf asks of a quantized network."""
_UNKNOWN = "Whether this can be trusted is not known"
_WORDS: Mapping[str, Mapping[Level, str]] = {
    "measured": {
        "good": "This can be trusted",
        "fair": "This is usable, with a loss",
        "poor": "This lost too much",
        "unknown": _UNKNOWN,
    },
    "expected": {
        "good": "This can probably be trusted",
        "fair": "This is probably usable, with a loss",
        "poor": "This may have lost too much",
        "unknown": _UNKNOWN,
    },
}
_SHARE, _TIMES, _MOST = 0.05, 3.0, 3
"""A harmful layer does that share of all harm and so many times the median; so many are named."""

HARM_WORDS: Mapping[str, str] = {
    "divergence": "the harm",
    "error": "the sum of the layers' own errors",
}
"""What a layer has a share of, by the kind of `gdfq.analysis.sensitivity.Harm`."""


@dataclass(frozen=True)
class Loss:
    """Points of accuracy that are lost, and the ends of an interval.

    kind: "measured" on test images, where the interval is of 95 %; or "expected" by
    `gdfq.analysis.accuracy_drop`
    from the outputs' error on held-out images, where it holds nine of ten.
    """

    kind: Literal["measured", "expected"]
    points: float
    low: float
    high: float
    reference: float | None
    """The accuracy before, in percent, where it is known."""

    def level(self) -> Level:
        """By what was measured, or by the most that is expected.

        Unknown where one end of the interval is good and the other poor.
        """
        low, high = self._level_of(self.low), self._level_of(self.high)
        if (low, high) == ("good", "poor"):
            return "unknown"
        return high if self.kind == "expected" else self._level_of(self.points)

    def _level_of(self, points: float) -> Level:
        lost = points / (100.0 if self.reference is None else max(self.reference, 1e-9))
        return "good" if lost <= _GOOD else "fair" if lost <= _FAIR else "poor"


@dataclass(frozen=True)
class Harmful:
    """A layer that does much of the harm, and the option that would help."""

    name: str
    share: float
    """Of the harm of all layers, in percent."""
    option: str
    bytes: int
    """That the option would add."""


@dataclass(frozen=True)
class Verdict:
    """One sentence, what it rests on, and what to do next."""

    level: Level
    sentence: str
    evidence: tuple[str, ...]
    advice: tuple[str, ...]


def verdict(run: Run, alarms: Sequence[str] = ()) -> Verdict:
    """The verdict on a run, of what could be read of it."""
    loss = loss_of(run)
    level = "unknown" if loss is None else loss.level()
    parts = list(filter(None, (_size(run), _speed(run.metrics), _lost(run, loss))))
    words = _UNKNOWN if loss is None else _WORDS[loss.kind][level]
    sentence = f"{words}: {', '.join(parts)}." if parts else f"{words}."
    return Verdict(level, sentence, tuple(_evidence(run, loss)), tuple(_advice(run, level, alarms)))


def loss_of(run: Run) -> Loss | None:
    """What was lost: measured if there was a test, else expected if that can be told."""
    drop = run.drop
    if drop is not None:
        before = float(run.metrics["teacher"]["top1"])
        error = number(run.evidence.get("test", {}).get("error"))
        margin = 1.96 * (error if error is not None else _unpaired(run.metrics))
        return Loss("measured", drop, drop - margin, drop + margin, before)
    trust = run.evidence.get("trust") or {}
    points, interval = number(trust.get("expected_drop")), trust.get("interval")
    if points is None or not interval:
        return None
    return Loss("expected", points, float(interval[0]), float(interval[1]), None)


def _unpaired(metrics: Record) -> float:
    """The standard error of a drop, in points, when only the two accuracies are known.

    One more right and one more wrong answer of each network keep few images from being certain
    (A. Agresti and B. Caffo, 2000, "Simple and effective confidence intervals for proportions").
    """
    images = max(1, int(metrics.get("test_images", 1)))
    right = (images * float(metrics[who]["top1"]) / 100 for who in ("teacher", "student"))
    shares = ((count + 1) / (images + 2) for count in right)
    return 100 * float(sum(p * (1 - p) / (images + 2) for p in shares) ** 0.5)


def harmful_layers(layers: Sequence[Record]) -> tuple[Harmful, ...]:
    """The layers that do far more harm than others, the worst first."""
    harms = [(layer, number(layer.get("harm")) or 0.0) for layer in layers]
    total, middle = sum(harm for _, harm in harms), median([harm for _, harm in harms] or [0.0])
    worst = sorted(harms, key=lambda pair: -pair[1])[:_MOST]
    return tuple(
        _remedy(layer, 100 * harm / total)
        for layer, harm in worst
        if harm > 0 and harm >= _SHARE * total and harm >= _TIMES * middle
    )


def _remedy(layer: Record, share: float) -> Harmful:
    bits = int(layer["bits"])
    wider = MAX_BITS if bits < MAX_BITS else None
    keep = LayerBits(LayerBits.exactly(layer["name"], MAX_BITS).pattern, wider)
    added = int(layer["weights"]) * ((wider or 32) - bits) // 8
    return Harmful(layer["name"], share, f"--layer-bits '{keep}'", added)


def size_words(count: float) -> str:
    """Bytes in the unit that people read."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    kib = count / 1024
    return f"{kib:.0f} KiB" if kib >= 10 else f"{kib:.1f} KiB"


def smaller(before: float, after: float) -> str:
    """How two sizes compare, in words."""
    if after > before:
        return f"{after / before:.1f} times larger"
    return f"{before / after:.1f} times smaller"


def lost_or_won(points: float) -> str:
    """A drop of accuracy, in words."""
    return f"{abs(points):.2f} points {'lost' if points >= 0 else 'won'}"


def faster(metrics: Record) -> float | None:
    """How many times faster one image on one thread is, if `gdfq bench` measured it."""
    timings = [t for t in metrics.get("bench") or [] if (t["batch"], t["threads"]) == (1, 1)]
    if len(timings) != 2:
        return None
    return float(timings[0]["median"]) / float(timings[1]["median"])


def _size(run: Run) -> str | None:
    before = number(run.metrics.get("float_bytes"))
    if run.file is None:
        return None
    size = size_words(run.file[1])
    return size if before is None else f"{size}, {smaller(before, run.file[1])}"


def _speed(metrics: Record) -> str | None:
    times = faster(metrics)
    if times is None:
        return None
    return f"{times:.1f} times as fast" if times >= 1 else f"{1 / times:.1f} times slower"


def _lost(run: Run, loss: Loss | None) -> str:
    if loss is None:
        errors = (run.metrics.get("student") or {}).get("error_percent")
        if errors:
            worst = max(errors, key=lambda name: errors[name])
            return f"outputs are off by {errors[worst]:.1f} % at most ({worst})"
        return "the loss of accuracy cannot be told"
    if loss.kind == "measured":
        before = loss.reference or 0.0
        after = before - loss.points
        return f"{lost_or_won(loss.points)} ({before:.2f} % before, {after:.2f} % now)"
    return f"about {loss.points:.1f} points are expected to be lost"


def _evidence(run: Run, loss: Loss | None) -> Iterator[str]:
    if run.file is not None:
        name, size = run.file
        before = number(run.metrics.get("float_bytes"))
        float_words = (
            "" if before is None else f"; the weights in float32 take {size_words(before)}"
        )
        yield f"Size: {name} has {size:,} bytes{float_words}."
    if loss is not None and loss.kind == "measured":
        yield (
            f"Accuracy: measured on {run.metrics.get('test_images', 'the')} test images, which "
            f"were used for nothing else; the drop lies in {loss.low:.2f} to {loss.high:.2f} "
            "points (95 % interval)."
        )
    if loss is not None and loss.kind == "expected":
        yield (
            f"Expected loss: {loss.low:.1f} to {loss.high:.1f} points, an interval that held nine "
            "of ten of other networks (docs/trust.md). It is an estimate: no accuracy was measured."
        )
    trust = run.evidence.get("trust") or {}
    if trust:
        yield _likeness(trust)
    if loss is None:
        yield f"Expected loss: it cannot be told. {trust.get('reason') or _UNTOLD}"
    if faster(run.metrics) is None:
        yield f"Speed: not measured; gdfq bench {run.folder} does."
    exported = (run.metrics.get("export") or {}).get("inside") or {}
    if exported.get("agreement") is not None:
        yield (
            f"File: ONNX Runtime gives the simulation's answers on {exported['agreement']:.1f} % "
            f"of {exported.get('images', '')} images."
        )


_UNTOLD = "This run holds neither a test of accuracy nor an estimate without data."


def _likeness(trust: Record) -> str:
    """How alike both networks are on held-out inputs: their answers, else their outputs."""
    inputs = f"{trust.get('images', '–')} held-out inputs ({trust.get('source', 'unknown')})"
    agreement, error = number(trust.get("agreement")), number(trust.get("relative_error"))
    if agreement is not None:
        return (
            f"Agreement: both networks give the same answer to {agreement:.1f} % of {inputs}. This "
            "is no measure of accuracy: mixtures of images are made to be hard."
        )
    if error is not None:
        return f"Outputs: they are off by {error:.1f} % on {inputs}."
    return f"Outputs: they are not finite on some of {inputs}."


def _has_classes(run: Run) -> bool:
    """Whether accuracy can be measured, as far as the run's files tell."""
    trust = run.evidence.get("trust")
    is_without = trust and number(trust.get("agreement")) is None
    return not (is_without or (run.metrics.get("student") or {}).get("error_percent"))


def _advice(run: Run, level: Level, alarms: Sequence[str]) -> Iterator[str]:
    yield from alarms
    found = run.evidence.get("layers") or {}
    if level != "good":
        for layer in harmful_layers(found.get("layers") or []):
            share = f"{layer.share:.0f} % of {HARM_WORDS[found.get('harm', 'divergence')]}"
            yield (
                f"{layer.option} keeps the layer with {share} wider; "
                f"that adds {size_words(layer.bytes)}."
            )
        yield from _wider(str(run.config.get("bits", "")))
        name = _recipe(run.config)
        if name in {"quick", "round", "zeroq"}:
            yield f"--recipe fast tunes longer than {name} and loses less."
        if not run.config.get("data"):
            yield (
                "A few hundred real images, if you can have them, may be worth more than synthetic "
                "ones: --recipe real --data DIR."
            )
    if level == "unknown" and _has_classes(run):
        more = "labelled images" if run.drop is None else "more labelled images"
        yield f"Measure it on {more}: gdfq evaluate {run.folder} --test DATA."
    if level == "good":
        yield "Nothing needs to be done. Deploy the file."


def _wider(bits: str) -> Iterator[str]:
    weights, _, activations = bits.removeprefix("w").partition("a")
    if not (weights.isdecimal() and activations.isdecimal()):
        return
    if int(activations) < MAX_BITS:
        yield f"--bits w{weights}a{MAX_BITS}: wider activations take no byte more in the file."
    elif int(weights) < MAX_BITS:
        yield f"--bits w{MAX_BITS}a{MAX_BITS}: wider weights, in a larger file."


def _recipe(config: Record) -> str:
    recipe: Any = config.get("recipe")
    return str(recipe.get("name", "")) if isinstance(recipe, dict) else str(recipe or "")
