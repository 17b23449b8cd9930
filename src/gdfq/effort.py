"""Effort: the images, iterations and steps of a run, and those that fit into a given time.

The time of a run is the sum of measured parts (`Costs`). A rule (`EffortRule`) says how a time is
divided. `effort_within` is a pure function of both: equal measurements give an equal effort.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from gdfq.errors import UsageError
from gdfq.execution.distributed import Group


def counted(count: int, noun: str) -> str:
    """Return a number of things in words, such as "1 step" and "2 steps"."""
    return f"{count} {noun}{'s' * (count != 1)}"


@dataclass(frozen=True)
class Effort:
    """How much work a run does.

    Attributes:
        images: Images that are made before the student learns; None for a source that makes its
            images while the student learns, and for given images.
        iterations: Updates of each image; None where there are no images, or none are updated.
        steps: Batches that the student is calibrated and tuned on; 0 if all images calibrate it
            and it is not tuned.
    """

    images: int | None
    iterations: int | None
    steps: int

    def __str__(self) -> str:
        """Return the effort in words, such as "256 images of 18 iterations, 400 steps"."""
        steps = counted(self.steps, "step")
        return f"{self.images_in_words}, {steps}" if self.images is not None else steps

    @property
    def images_in_words(self) -> str:
        """The images alone, such as "256 images of 18 iterations"; empty if there are none."""
        if self.images is None:
            return ""
        made = "" if self.iterations is None else f" of {counted(self.iterations, 'iteration')}"
        return f"{counted(self.images, 'image')}{made}"

    def as_values(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {"images": self.images, "iterations": self.iterations, "steps": self.steps}


@dataclass(frozen=True)
class EffortRule:
    """How a time is divided. All numbers that decide about it are here.

    Images come in multiples of `min_images`. The iterations of each image grow with the logarithm
    of the number of images, from `min_iterations` for the fewest to `max_iterations` for
    `many_images` and more.

    Attributes:
        min_images: Fewest images.
        many_images: Images from which on each has `max_iterations`.
        max_images: Most images.
        min_iterations: Iterations of the fewest images.
        max_iterations: Iterations of many images.
        image_share: Share of the time for images, of the time that is left after the fixed parts of
            a run. The rest is for tuning. Without tuning images get all of it.
        max_views: How often tuning sees an image, at most; time that is left makes more images.
            None for no limit.
        min_steps: Fewest steps of a student that is tuned.
        used_share: Share of the whole time that is planned. The rest is for what is not measured,
            such as checkpoints.
        tuned_images: Fewest made images of a student that is tuned.
        tuned_steps: Fewest steps on made images of a student that is tuned.
        untuned_images: Most images of a student that is not tuned because the time is too short for
            both; 0 if it is always tuned.
    """

    min_images: int = 32
    many_images: int = 1024
    max_images: int = 1024
    min_iterations: int = 10
    max_iterations: int = 24
    image_share: float = 1 / 3
    max_views: int | None = None
    min_steps: int = 4
    used_share: float = 0.97
    tuned_images: int = 1
    tuned_steps: int = 4
    untuned_images: int = 0

    def limited(self, images: int) -> "EffortRule":
        """Return this rule with at most so many images, but at least one."""
        most = max(1, min(self.max_images, images))
        least = min(self.min_images, most)
        return replace(
            self,
            min_images=least,
            many_images=min(self.many_images, most),
            max_images=most,
            tuned_images=min(self.tuned_images, most // least * least),
            untuned_images=min(self.untuned_images, most),
        )

    def with_iterations(self, iterations: int) -> "EffortRule":
        """Return this rule with a fixed number of iterations."""
        return replace(self, min_iterations=iterations, max_iterations=iterations)

    def iterations(self, images: int) -> int:
        """Return the iterations of each of so many images."""
        if images >= self.many_images:
            return self.max_iterations
        place = math.log(images / self.min_images) / math.log(self.many_images / self.min_images)
        return round(self.min_iterations + place * (self.max_iterations - self.min_iterations))

    def max_steps(self, images: int | None, batch: int) -> int:
        """Return the most steps of tuning on so many images, `batch` of them in each step."""
        if images is None or self.max_views is None:
            return MAX_STEPS
        return max(self.min_steps, self.max_views * images // batch)


MAX_STEPS = 10**6
"""Most steps of any run; published schedules have 80,000."""


@dataclass(frozen=True)
class Costs:
    """Seconds of the parts of a run, and how often each part occurs in it.

    Attributes:
        fixed: What does not depend on the effort: what has already passed, the setup of all stages,
            and what follows the run.
        iteration: One iteration of one image; None if no images are made before the student learns.
        draw: One batch of a source that makes its images while the student learns.
        calibration: Calibration on one batch.
        matching: Moment matching on one batch.
        step: One update of the student; None if it is not tuned: all steps calibrate.
        batch: Images of a step, at most.
        calibrated: Most batches that calibrate.
        matched: Most batches whose moments are matched, on the average of the layers.
        warmup: Most steps before the first update.
        fewest: Fewest steps of a student that is not tuned, of a source that makes no images before
            it learns.
        steps: Most steps.
    """

    fixed: float
    iteration: float | None = None
    draw: float = 0.0
    calibration: float = 0.0
    matching: float = 0.0
    step: float | None = None
    batch: int = 1
    calibrated: int = 1
    matched: float = 0.0
    warmup: int = 1
    fewest: int = 1
    steps: int = MAX_STEPS

    def after(self, seconds: float) -> "Costs":
        """Return these costs after so many seconds, which count as fixed ones."""
        return replace(self, fixed=self.fixed + seconds)

    def agreed(self, group: Group, device: torch.device) -> "Costs":
        """Return the costs that the first of several processes has measured."""
        names = ("fixed", "iteration", "draw", "calibration", "matching", "step")
        measured = [name for name in names if getattr(self, name) is not None]
        values = torch.tensor([getattr(self, name) for name in measured], device=device)
        return replace(
            self, **dict(zip(measured, group.broadcast(0, values).tolist(), strict=True))
        )

    def of_images(self, effort: Effort) -> float:
        """Return the seconds of making the images of an effort.

        The predictions for the finished images take about half an iteration.
        """
        if self.iteration is None or effort.images is None or effort.iterations is None:
            return 0.0
        return self.iteration * effort.images * (effort.iterations + 0.5)

    def seconds(self, effort: Effort) -> float:
        """Return the seconds of a run with an effort."""
        steps, quarter = effort.steps, effort.steps // 4  # as Recipe.with_steps divides them
        calibrated, tuning = float(steps), 0.0
        if self.step is not None and steps:
            calibrated = min(self.calibrated, quarter)
            tuning = self.step * (steps - min(self.warmup, quarter))
        elif effort.images is not None:  # each image calibrates once
            calibrated = effort.images / self.batch
        return (
            self.fixed
            + self.of_images(effort)
            + self.draw * steps
            + self.calibration * calibrated
            + self.matching * min(calibrated, self.matched)
            + tuning
        )


def effort_within(seconds: float, costs: Costs, rule: EffortRule) -> Effort:
    """Return the largest effort whose seconds are within a time.

    Images take their share of the time, and steps the rest. Where the images may not be seen so
    often, there are more images and fewer steps; where the time is too short to tune on enough
    images, there are images alone. More time never gives fewer images or iterations. It gives fewer
    steps only together with more images.

    Args:
        seconds: The time of the whole run.
        costs: Measured seconds of its parts.
        rule: How the time is divided.

    Raises:
        UsageError: The least effort takes longer; the message says how long.
    """
    planned = rule.used_share * seconds

    def fits(effort: Effort) -> bool:
        return costs.seconds(effort) <= planned

    def fits_with(effort: Effort, steps: int) -> bool:
        return fits(replace(effort, steps=steps))

    efforts = list(_image_efforts(costs, rule))
    least = efforts[0]
    tunes = costs.step is not None
    if tunes and least.images is not None and rule.untuned_images and not fits(least):
        most = max(rule.min_images, rule.untuned_images)
        untuned = replace(costs, step=None)
        return replace(effort_within(seconds, untuned, replace(rule, max_images=most)), steps=0)
    if not fits(least):
        needed = math.ceil(costs.seconds(least) / rule.used_share)
        raise UsageError(
            f"a budget must be at least {needed} s for this network on this machine, of which "
            f"{math.ceil(costs.fixed)} s do not depend on the effort; got {seconds:g} s. Give a "
            "longer budget."
        )
    room = (rule.image_share if tunes else 1.0) * (planned - costs.fixed)
    affordable = [effort for effort in efforts if fits(effort)]
    in_room = [effort for effort in affordable if costs.of_images(effort) <= room]
    chosen = in_room[-1] if in_room else least
    if chosen.images is not None and not tunes:
        return chosen
    for effort in affordable[affordable.index(chosen) :]:
        most = min(costs.steps, rule.max_steps(effort.images, costs.batch))
        steps = _largest(effort.steps, max(effort.steps, most), partial(fits_with, effort))
        chosen = replace(effort, steps=steps)
        if steps < most:
            break
    return chosen


def _image_efforts(costs: Costs, rule: EffortRule) -> Iterator[Effort]:
    """Yield the images that may be chosen, with the fewest steps, in ascending order."""
    if costs.iteration is None:
        yield Effort(None, None, costs.fewest if costs.step is None else rule.min_steps)
        return
    for images in range(rule.min_images, rule.max_images + 1, rule.min_images):
        if costs.step is None:
            yield Effort(images, rule.iterations(images), -(-images // costs.batch))
        elif images >= rule.tuned_images:
            yield Effort(images, rule.iterations(images), max(rule.min_steps, rule.tuned_steps))


def _largest(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """Return the largest number from `low` to `high` that fits; all smaller ones do."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
