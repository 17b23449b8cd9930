"""The stages of a student, top to bottom: build → calibrate → warm up → tune → freeze."""

from collections.abc import Callable

import torch
from torch import Tensor

from gdfq.execution.context import Context
from gdfq.execution.progress import Step
from gdfq.files.states import Results
from gdfq.graph.capture import Captured
from gdfq.quantizers.family import QuantizerFamily
from gdfq.recipes import Recipe
from gdfq.sources.base import Source
from gdfq.sources.stream import Feed
from gdfq.student.build import build_student, check_scheme
from gdfq.student.equalization import channel_scales, rescaled
from gdfq.student.freeze import freeze
from gdfq.student.integer_network import IntegerNetwork
from gdfq.student.scheme import Scheme
from gdfq.tuning.calibrate import calibrate_
from gdfq.tuning.moment_matching import match_moments_

STUDENT_PARTS = ("scales", "student", "done")
"""Parts of a student that are registered while it is made, besides those of its tuning."""


def quantize_captured(
    teacher: Captured,
    scheme: Scheme,
    recipe: Recipe,
    source: Source,
    *,
    context: Context = Context(),
) -> tuple[IntegerNetwork, Tensor]:
    """The heart of `quantize`: the frozen student of a captured teacher, on a source's batches.

    With it come a few images of the first batch [n, *input_shape].
    """
    stream = source.stream(teacher, steps=recipe.steps, context=context)
    feed = Feed(stream, teacher.device)
    network, _ = frozen_student(teacher, scheme, recipe, feed, context=context)
    return network, feed.examples


def frozen_student(
    teacher: Captured,
    scheme: Scheme,
    recipe: Recipe,
    feed: Feed,
    *,
    context: Context = Context(),
    lap: Callable[[str], None] = lambda _: None,
) -> tuple[IntegerNetwork, Captured]:
    """The student after all stages, each of which goes on where the keeper's parts are.

    With it comes the teacher as the student began from it: its channels have the same scales.
    `lap` is called with the name of each stage when it ends.
    """
    tuning, checkpointer, group = recipe.tuning, context.checkpointer, context.group
    if recipe.quantizers.equalizes:
        teacher = _equalized(teacher, scheme, recipe.quantizers, feed, context)
    student = build_student(
        teacher,
        scheme,
        quantizers=recipe.quantizers,
        fixed_statistics=tuning.fixed_statistics,
    ).eval()
    checkpointer.register("student", student)
    done = checkpointer.register("done", Results())

    def ends(stage: str) -> None:
        done[stage] = True
        lap(stage)
        checkpointer.stage_ends()

    if "calibrate" not in done:
        hold = recipe.match_moments or tuning.holds_batches
        calibrate_(
            student,
            feed.until(recipe.calibration, hold=hold),
            first_step=feed.taken,
            steps=recipe.calibration,
            context=context,
        )
        if recipe.match_moments:
            images = torch.cat([batch.images for batch in feed.held])
            match_moments_(student, teacher, images, context.memory)
        # All saw the same batches, so they differ by what their devices round, if at all.
        group.same_(student.state_dict().values())
        ends("calibrate")
    if tuning.trains and "tune" not in done:
        if "warmup" not in done:
            for batch in feed.until(recipe.warmup):  # the student waits
                context.listener(Step("warmup", feed.taken, recipe.warmup, batch.losses))
            ends("warmup")
        tuning.run_(
            student,
            teacher,
            feed,
            first_step=recipe.warmup,
            total_steps=recipe.steps,
            batch=recipe.source.batch,
            context=context,
        )
        ends("tune")
    network = freeze(student)
    lap("freeze")
    return network, teacher


def _equalized(
    teacher: Captured, scheme: Scheme, quantizers: QuantizerFamily, feed: Feed, context: Context
) -> Captured:
    """The teacher with alike channels, by the first images; after a stop, and everywhere, the same.

    Raises UsageError for a scheme that cannot be, before the images are made.
    """
    scales = context.checkpointer.register("scales", Results())
    if not scales:
        check_scheme(teacher, scheme, quantizers)
        feed.begin()
        scales.update(channel_scales(teacher, scheme, feed.examples))
        # A search ends elsewhere where devices round otherwise.
        context.group.same_(scales.values())
    return rescaled(teacher, {name: s.to(teacher.device) for name, s in scales.items()})
