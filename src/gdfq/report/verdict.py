"""The verdict on a run: one sentence, the facts it is based on, and what to do next."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from gdfq.deploy.export import TARGETS
from gdfq.deploy.onnx.target import ONNX
from gdfq.report import denoiser
from gdfq.report.advice import advice
from gdfq.report.drop import Drop, Level, drop_of
from gdfq.report.language import PerplexityRise, rise_of
from gdfq.report.read import Record, Run, number
from gdfq.report.wording import faster, lost_or_gained, size_words, smaller

_UNKNOWN = "The accuracy is not known"
_SENTENCES: Mapping[str, Mapping[Level, str]] = {
    "measured": {
        "good": "The accuracy is close to the original's",
        "fair": "The accuracy is somewhat lower",
        "poor": "The accuracy is much lower",
        "unknown": "The test images are too few to judge the accuracy",
    },
    "expected": {
        "good": "The accuracy is probably close to the original's",
        "fair": "The accuracy is probably somewhat lower",
        "poor": "The accuracy may be much lower",
        "unknown": _UNKNOWN,
    },
}
_TEXT_SENTENCES: Mapping[Level, str] = {
    "good": "The predictions are close to the original's",
    "fair": "The predictions are somewhat worse",
    "poor": "The predictions are much worse",
}
_IMAGE_SENTENCES: Mapping[Level, str] = {
    "good": "The generated images are close to the original's",
    "fair": "The generated images differ somewhat from the original's",
    "poor": "The generated images differ much from the original's",
    "unknown": "The generated images were not compared with the original's",
}
_NO_ESTIMATE = "This run has neither a test on labelled images nor an estimate without them."


@dataclass(frozen=True)
class Verdict:
    """What a user should know first about a run.

    Attributes:
        level: The level of its accuracy drop (`gdfq.report.drop.Drop.level`).
        sentence: The verdict in one sentence.
        evidence: The facts that it is based on.
        advice: What to do next.
    """

    level: Level
    sentence: str
    evidence: tuple[str, ...]
    advice: tuple[str, ...]


def verdict(run: Run, warnings: Sequence[str] = ()) -> Verdict:
    """The verdict on a run, from what could be read of it.

    Args:
        run: The run.
        warnings: Warnings about its images (`gdfq.report.source_warnings`), which come first in the
            advice.
    """
    if (rise := rise_of(run)) is not None:
        return _verdict_on_text(run, rise)
    if denoiser.is_denoiser(run):
        return _verdict_on_images(run)
    drop = drop_of(run)
    level = "unknown" if drop is None else drop.level()
    parts = list(filter(None, (_size(run), _speed(run), _lost(run, drop))))
    start = _UNKNOWN if drop is None else _SENTENCES[drop.kind][level]
    sentence = f"{start}: {', '.join(parts)}." if parts else f"{start}."
    facts, actions = tuple(_evidence(run, drop)), tuple(advice(run, level, warnings))
    return Verdict(level, sentence, facts, actions)


def _verdict_on_images(run: Run) -> Verdict:
    """The verdict on the denoiser of a diffusion model."""
    level = denoiser.level_of(run)
    size = _size(run)
    sentence = f"{_IMAGE_SENTENCES[level]}{f': {size}' if size else ''}."
    return Verdict(level, sentence, tuple(denoiser.facts(run)), tuple(denoiser.advice(run, level)))


def _verdict_on_text(run: Run, rise: PerplexityRise) -> Verdict:
    """The verdict on a language model."""
    start = _TEXT_SENTENCES[rise.level]
    size = _size(run)
    sentence = f"{start}: {size}." if size else f"{start}."
    actions = tuple(_advice_on_text(run, rise))
    return Verdict(rise.level, sentence, (f"{rise.sentence}.",), actions)


def _advice_on_text(run: Run, rise: PerplexityRise) -> Iterator[str]:
    if rise.kind == "expected":
        yield (
            f"Measure the perplexity on real text: gdfq evaluate {run.folder} --test tokens.npz "
            "--model MODEL."
        )
    if rise.level != "good":
        yield "More bits lose less: --bits w4a8, w4a16 or w8a8, or --group-size 32."


def why_not_estimated(run: Run) -> str:
    """Why the accuracy drop of a run is not estimated: a sentence; empty if that was not tried."""
    if reason := (run.evidence.get("trust") or {}).get("reason"):
        return str(reason)
    failure = (run.evidence.get("missing") or {}).get("trust")
    return f"The estimate failed: {failure}." if failure else ""


def _size(run: Run) -> str | None:
    before = number(run.metrics.get("float_bytes"))
    if run.file is None:
        return None
    size = size_words(run.file[1])
    return size if before is None else f"{size}, {smaller(before, run.file[1])}"


def _speed(run: Run) -> str | None:
    times = _faster(run)
    if times is None:
        return None
    return f"{times:.1f} times as fast" if times >= 1 else f"{1 / times:.1f} times slower"


def _faster(run: Run) -> float | None:
    return None if run.file is None else faster(run.metrics, run.file[0])


def _lost(run: Run, drop: Drop | None) -> str:
    if drop is None:
        student = run.metrics.get("student") or {}
        if cosines := student.get("cosine"):
            return f"cosine with the original's vectors {min(cosines.values()):.4f}"
        if decisions := student.get("decisions_percent"):
            return f"{min(decisions.values()):.1f} % of the decisions are the original's"
        errors = student.get("error_percent")
        if errors:
            largest = max(errors, key=lambda name: errors[name])
            return f"relative error of the outputs at most {errors[largest]:.1f} % ({largest})"
        failed = "could not be" if why_not_estimated(run) else "was not"
        return f"the accuracy drop {failed} estimated"
    if drop.kind == "measured":
        before = drop.reference or 0.0
        after = before - drop.points
        return f"{lost_or_gained(drop.points)} ({before:.2f} % before, {after:.2f} % after)"
    return f"expected accuracy drop about {drop.points:.1f} points"


def _evidence(run: Run, drop: Drop | None) -> Iterator[str]:
    if run.file is not None:
        name, size = run.file
        before = number(run.metrics.get("float_bytes"))
        weights = "" if before is None else f"; the weights in float32 take {size_words(before)}"
        yield f"Size: {name} has {size:,} bytes{weights}."
    if drop is not None and drop.kind == "measured":
        yield (
            f"Accuracy: measured on {run.metrics.get('test_images', 'the')} test images, which "
            f"were used for nothing else; the drop is between {drop.low:.2f} and {drop.high:.2f} "
            "points (95 % interval)."
        )
    if drop is not None and drop.kind == "expected":
        yield (
            f"Expected accuracy drop: between {drop.low:.1f} and {drop.high:.1f} points. This "
            "interval held for nine in ten students of other networks (docs/trust.md). It is an "
            "estimate: no accuracy was measured."
        )
    trust = run.evidence.get("trust") or {}
    if trust:
        yield _similarity(trust)
    if drop is None:
        yield f"Expected accuracy drop: no estimate. {why_not_estimated(run) or _NO_ESTIMATE}"
    target = TARGETS.get(str(run.exported.get("target", ONNX.name))) if run.exported else None
    is_timed = target is not None and target.runtime is not None and target.runtime.calls
    if is_timed and _faster(run) is None:
        yield f"Speed: not measured. Measure it with gdfq bench {run.folder}."
    inside = run.exported.get("inside") or {}
    if inside.get("agreement") is not None and target is not None and target.runtime is not None:
        yield (
            f"File: {target.runtime.name} predicts the same class as the simulation for "
            f"{inside['agreement']:.1f} % of {inside.get('images', '')} images."
        )


def _similarity(trust: Record) -> str:
    """How similar teacher and student are on held-out inputs: agreement, or error of outputs."""
    inputs = f"{trust.get('images', '–')} held-out inputs ({trust.get('source', 'unknown')})"
    agreement, error = number(trust.get("agreement")), number(trust.get("relative_error"))
    if agreement is not None:
        return (
            f"Agreement: both networks predict the same class for {agreement:.1f} % of {inputs}. "
            "This is not an accuracy: mixtures of images are difficult by design."
        )
    cosine, decisions = number(trust.get("cosine")), number(trust.get("decisions"))
    if cosine is not None:
        return f"Outputs: their mean cosine with the original's is {cosine:.4f} on {inputs}."
    if decisions is not None:
        return (
            f"Outputs: {decisions:.1f} % of the decisions (a probability above one half) are the "
            f"original's on {inputs}; the logits have a relative error of {error or 0:.1f} %."
        )
    if error is not None:
        return f"Outputs: their relative error is {error:.1f} % on {inputs}."
    return f"Outputs: they are not finite for some of {inputs}."
