"""Warnings about the images of a run and about the source that makes them.

Each check is a function of plain numbers that returns a sentence, or None if all is well.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gdfq.report.read import Record, Run

_MIN_DIVERSITY = 0.1
"""Diversity of pixels relative to unrelated images; less is one image with a little noise."""
_MIN_DIVERSITY_WITHIN_CLASS = 0.05
_MAX_CLIPPED_PERCENT = 50.0
"""Images are made without bounds, so some of their pixels always lie outside 0..255."""
_MAX_NOISE_RATIO = 0.9
"""Largest distance of statistics, relative to that of noise."""
_MAX_LOSS_RATIO = 0.9
"""Largest mean loss at the end, relative to that at the start."""
_MIN_COVERAGE = 0.5
"""Smallest share of the possible classes."""
_CURVE_PARTS = 10
"""A curve is judged by the means of its first and its last tenth."""


def collapse(diversity: Mapping[str, Any], *, given: bool = False) -> str | None:
    """Warn if all images, or all images of a class, are alike.

    `diversity` has the attributes of `gdfq.analysis.images.Diversity`.
    """
    advice = "Give images that differ." if given else "Use another seed or recipe fast."
    if diversity["pixels"] < _MIN_DIVERSITY:
        return (
            "Collapse: all images are alike (their pixel diversity is "
            f"{100 * diversity['pixels']:.0f} % of that of unrelated images). {advice}"
        )
    within = diversity.get("within_class")
    if within is not None and within < _MIN_DIVERSITY_WITHIN_CLASS:
        return (
            "Collapse: the images of a class are alike (their feature distance is "
            f"{100 * within:.0f} % of that of all images). {advice}"
        )
    return None


def saturated(clipped: float) -> str | None:
    """Warn if most pixels are out of range; `clipped` is their share in percent."""
    if clipped <= _MAX_CLIPPED_PERCENT:
        return None
    return (
        f"Saturation: {clipped:.0f} % of the pixels are below 0 or above 255, so the images shown "
        "differ from the network's inputs. Check that --mean and --std are those of the network."
    )


def uncovered(classes: Mapping[str, Any] | None) -> str | None:
    """Warn if the teacher predicts few of the classes.

    `classes` has the attributes of `gdfq.analysis.images.Classes`; None without classes.
    """
    if classes is None or classes["predicted"] >= _MIN_COVERAGE * classes["possible"]:
        return None
    return (
        f"Coverage: the teacher predicts only {classes['predicted']} of {classes['possible']} "
        "possible classes for the images. The student is not tuned on the others."
    )


def no_better_than_noise(distances: Sequence[Mapping[str, Any]], why: str) -> str | None:
    """Warn if the statistics are as far from the batch norms' as those of noise, and say why."""
    if not distances:
        return None
    ours = sum(d["synthetic"] for d in distances) / len(distances)
    noise = min(sum(d[kind] for d in distances) for kind in ("white", "natural")) / len(distances)
    if ours <= _MAX_NOISE_RATIO * noise:
        return None
    return (
        f"The distance of the images' statistics from the batch-norm statistics ({ours:.2g}) is "
        f"not clearly below that of noise ({noise:.2g}): {why}"
    )


def not_converging(losses: Sequence[float]) -> str | None:
    """Warn if the loss of a generator, given by step, has hardly decreased."""
    part = len(losses) // _CURVE_PARTS
    if part == 0:
        return None
    first, last = (sum(values) / part for values in (losses[:part], losses[-part:]))
    if last < _MAX_LOSS_RATIO * first:
        return None
    return (
        f"The generator does not converge: its mean loss is {first:.3g} in the first tenth of the "
        f"steps and {last:.3g} in the last tenth. Give it more steps, or use another seed."
    )


def generator_losses(history: Sequence[Record]) -> list[float]:
    """The losses, by step, of a source that learns together with the student."""
    return [float(record["generator"]) for record in history if "generator" in record]


def source_warnings(run: Run) -> tuple[str, ...]:
    """All warnings of a run about its images, where they were measured, and about their source."""
    images, losses = run.evidence.get("images"), generator_losses(run.history)
    given = bool(run.config.get("data"))

    def results() -> Iterator[str | None]:
        if images is not None:
            yield collapse(images["diversity"], given=given)
            yield saturated(images["clipped"])
            yield uncovered(images["classes"])
            yield no_better_than_noise(images["distances"], _why_like_noise(losses, given=given))
        yield not_converging(losses)

    return tuple(warning for warning in results() if warning is not None)


def _why_like_noise(losses: Sequence[float], *, given: bool) -> str:
    """Why the statistics of images can be like those of noise, and what to do.

    Args:
        losses: Losses of a source that learns together with the student; none of another one.
        given: Whether the user gave the images.
    """
    if given:
        return (
            "these images are unlike those that the network was trained on. Check that --mean and "
            "--std are those of the network, or give other images."
        )
    effort = "steps" if losses else "iterations"
    return f"the source has learned almost nothing. Give it more {effort} (--{effort})."
