"""The stages of a student, top to bottom: build → calibrate → warm up → tune → freeze."""

from collections.abc import Callable

import torch
from torch import Tensor, fx

from gdfq.execution.checkpoints import Keeper, Unkept
from gdfq.execution.distributed import ALONE, Group
from gdfq.execution.progress import Listener, Step, silent
from gdfq.files.states import Noted
from gdfq.graph.capture import Captured
from gdfq.recipes import Recipe
from gdfq.sources.base import Source
from gdfq.sources.stream import Feed
from gdfq.student.build import build_student, check_scheme
from gdfq.student.equalization import channel_scales, rescaled
from gdfq.student.freeze import freeze
from gdfq.student.scheme import Scheme
from gdfq.tuning.calibrate import calibrate_, match_moments_
from gdfq.tuning.distill import Distillation, tune_
from gdfq.tuning.reconstruct import Reconstruction, reconstruct_

STUDENT_PARTS = ("scales", "student", "done", "optimizer", "reconstruction")
"""What is held of a student while it is made."""


def quantize_captured(
    teacher: Captured,
    scheme: Scheme,
    recipe: Recipe,
    source: Source,
    *,
    seed: int,
    listener: Listener = silent,
    group: Group = ALONE,
) -> tuple[fx.GraphModule, Tensor]:
    """The heart of `quantize`: the frozen student of a captured teacher, on a source's batches.

    With it come a few images of the first batch [n, *input_shape].
    """
    stream = source.stream(teacher, steps=recipe.steps, seed=seed, listener=listener, group=group)
    feed = Feed(stream, teacher.device)
    network, _ = frozen_student(
        teacher, scheme, recipe, feed, seed=seed, listener=listener, group=group
    )
    return network, feed.examples


def frozen_student(
    teacher: Captured,
    scheme: Scheme,
    recipe: Recipe,
    feed: Feed,
    *,
    seed: int,
    listener: Listener,
    lap: Callable[[str], None] = lambda _: None,
    keeper: Keeper = Unkept(),  # noqa: B008 (it has no state)
    group: Group = ALONE,
) -> tuple[fx.GraphModule, Captured]:
    """The student after all stages, each of which goes on where the keeper's parts are.

    With it comes the teacher as the student began from it: its channels have the same scales.
    `lap` is called with the name of each stage when it ends.
    """
    tuning = recipe.tuning
    if recipe.quantizers == "learned":
        teacher = _equalized(teacher, scheme, feed, keeper, group)
    student = build_student(
        teacher,
        scheme,
        quantizers=recipe.quantizers,
        fixed_statistics=not isinstance(tuning, Distillation) or tuning.fixed_statistics,
    ).eval()
    keeper.hold("student", student)
    done = keeper.hold("done", Noted())

    def ends(stage: str) -> None:
        done[stage] = True
        lap(stage)
        keeper.stage_ends()

    if "calibrate" not in done:
        hold = recipe.match_moments or isinstance(tuning, Reconstruction)
        calibrate_(
            student,
            feed.until(recipe.calibration, hold=hold),
            first_step=feed.taken,
            steps=recipe.calibration,
            listener=listener,
        )
        if recipe.match_moments:
            match_moments_(student, teacher, torch.cat([batch.images for batch in feed.held]))
        # All saw the same batches, so they differ by what their devices round, if at all.
        group.same_(student.state_dict().values())
        ends("calibrate")
    if tuning is not None and "tune" not in done:
        if "warmup" not in done:
            for batch in feed.until(recipe.warmup):  # the student waits
                listener(Step("warmup", feed.taken, recipe.warmup, batch.losses))
            ends("warmup")
        if isinstance(tuning, Reconstruction):
            reconstruct_(
                student,
                teacher,
                feed.hold(-(-tuning.images // recipe.source.batch)),
                tuning,
                updates=recipe.steps - recipe.warmup,
                seed=seed,
                listener=listener,
                keeper=keeper,
            )
        else:
            tune_(
                student,
                teacher,
                feed.until(recipe.steps),
                tuning,
                first_step=feed.taken,
                total_steps=recipe.steps,
                listener=listener,
                keeper=keeper,
                group=group,
            )
        ends("tune")
    network = freeze(student)
    lap("freeze")
    return network, teacher


def _equalized(
    teacher: Captured, scheme: Scheme, feed: Feed, keeper: Keeper, group: Group
) -> Captured:
    """The teacher with alike channels, by the first images; after a stop, and everywhere, the same.

    Raises UsageError for a scheme that cannot be, before the images are made.
    """
    scales = keeper.hold("scales", Noted())
    if not scales:
        check_scheme(teacher, scheme, "learned")
        feed.begin()
        scales.update(channel_scales(teacher, scheme, feed.examples))
        # A search ends elsewhere where devices round otherwise.
        group.same_(scales.values())
    return rescaled(teacher, {name: s.to(teacher.device) for name, s in scales.items()})
