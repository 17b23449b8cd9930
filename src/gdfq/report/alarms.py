"""What can be wrong with synthetic images and with the source that makes them.

Each alarm is a function of plain numbers that returns a sentence, or None.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gdfq.report.read import Record

_ALIKE = 0.1
"""Of what unrelated images have: less is one picture with a little noise."""
_ALIKE_WITHIN = 0.05
_CLIPPED = 50.0
"""Percent of the pixels. Images are made without bounds, and some of their pixels lie outside."""
_NO_BETTER = 0.9
"""Of the distance that noise has."""
_COVERED = 0.5
_PARTS = 10
"""A curve is judged by the means of its first and last tenth."""


def collapse(diversity: Mapping[str, Any]) -> str | None:
    """All images alike, or all of a class (see `gdfq.analysis.images.Diversity`)."""
    if diversity["pixels"] < _ALIKE:
        return (
            "Collapse: all images are alike (their pixels differ by "
            f"{100 * diversity['pixels']:.0f} % of what unrelated images do). Use another seed or "
            "recipe fast."
        )
    within = diversity.get("within_class")
    if within is not None and within < _ALIKE_WITHIN:
        return (
            "Collapse: the images of a class are alike (to the network they differ by "
            f"{100 * within:.0f} % of what images of all classes do). Use another seed or recipe "
            "fast."
        )
    return None


def saturated(clipped: float) -> str | None:
    """Most pixels beyond black and white, in percent."""
    if clipped <= _CLIPPED:
        return None
    return (
        f"Saturation: {clipped:.0f} % of the pixels lie beyond black or white, so the pictures "
        "are not what the network sees. Check that --mean and --std are the network's own."
    )


def uncovered(classes: Mapping[str, Any] | None) -> str | None:
    """Classes that the teacher never sees in the images (see `evidence.images.Classes`)."""
    if classes is None or classes["answered"] >= _COVERED * classes["possible"]:
        return None
    return (
        f"Coverage: the network sees {classes['answered']} classes in images that could show "
        f"{classes['possible']}; what it knows of the others is not tuned on."
    )


def no_better_than_noise(distances: Sequence[Mapping[str, Any]]) -> str | None:
    """Statistics that are as far from the batch norms' as those of noise."""
    if not distances:
        return None
    ours = sum(d["synthetic"] for d in distances) / len(distances)
    noise = min(sum(d[kind] for d in distances) for kind in ("white", "natural")) / len(distances)
    if ours <= _NO_BETTER * noise:
        return None
    return (
        f"The images' statistics are as far from the network's ({ours:.2g}) as those of noise "
        f"({noise:.2g}): the source has learned next to nothing. Give it more steps."
    )


def not_converging(losses: Sequence[float]) -> str | None:
    """A generator whose loss, by step, ends no lower than it began."""
    part = len(losses) // _PARTS
    if part == 0:
        return None
    first, last = (sum(values) / part for values in (losses[:part], losses[-part:]))
    if last < _NO_BETTER * first:
        return None
    return (
        f"The generator does not converge: its loss was {first:.3g} at first and is {last:.3g} at "
        "the end. Give it more steps, or another seed."
    )


def generator_losses(history: Sequence[Record]) -> list[float]:
    """The losses of a source that learns while the student does, by step."""
    return [float(record["generator"]) for record in history if "generator" in record]


def alarms(images: Record | None, history: Sequence[Record]) -> tuple[str, ...]:
    """All alarms of a run; `images` is the section of its evidence, if there is one."""

    def found() -> Iterator[str | None]:
        if images is not None:
            yield collapse(images["diversity"])
            yield saturated(images["clipped"])
            yield uncovered(images["classes"])
            yield no_better_than_noise(images["distances"])
        yield not_converging(generator_losses(history))

    return tuple(alarm for alarm in found() if alarm is not None)
