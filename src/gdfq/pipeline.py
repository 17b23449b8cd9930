"""The whole method, top to bottom: capture → source → student → calibrate → tune → freeze."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from gdfq.allocation import BASE, choose_widths
from gdfq.capture import Captured, capture, tensors_of
from gdfq.card import Card
from gdfq.data import ImageData, Preprocessing, Resize, load_data
from gdfq.errors import UsageError
from gdfq.evaluate import Answers, logits_of, output_errors
from gdfq.export import metadata_of
from gdfq.freeze import freeze
from gdfq.grid import Bits
from gdfq.outputs import output_names
from gdfq.progress import Listener, Step, silent
from gdfq.quantized import QuantizedNetwork
from gdfq.recipes import Recipe, find_recipe
from gdfq.sources import Batch, Source
from gdfq.sources.images import on_images
from gdfq.sources.pool import ImagePool, collect, first_images
from gdfq.student import PLACEMENTS, Keep, Placement, Scheme, build_student
from gdfq.tuning.calibrate import calibrate_, match_moments_
from gdfq.tuning.distill import Distillation, tune_
from gdfq.tuning.reconstruct import Reconstruction, reconstruct_
from gdfq.witness import Remembering, Tested

_EXAMPLES = 32
_MEASURED = ("teacher", "student")
AUTO = "auto"
"""In the place of widths: they are to be chosen."""

Data = str | Path | Tensor | tuple[Tensor, Tensor] | ImageData


def quantize(
    model: nn.Module | Captured,
    example_input: Tensor,
    bits: str | Bits = "w4a4",
    recipe: str | Recipe = "fast",
    *,
    size: int | None = None,
    data: Data | None = None,
    test: Data | None = None,
    placement: Placement | None = None,
    keep: Sequence[str] = (),
    steps: int | None = None,
    seed: int = 0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    resize: Resize | None = None,
    device: str = "auto",
    classifier: bool | None = None,
    listener: Listener = silent,
) -> QuantizedNetwork:
    """Quantize a trained network; without `data` no real image is used.

    model: any nn.Module that maps images to logits, or to other tensors (see `classifier`), or
        a `gdfq.capture.Captured`, which was captured before; it is not changed.
    example_input: [N, C, H, W], one input or more as the network takes them (normalised).
    bits: widths of weights and activations, 2..8 each, as "w4a4"; or "auto", which chooses each
        layer's so that the ONNX file is no larger than `size` bytes (see `gdfq.allocation`).
    recipe: a name in `gdfq.RECIPES` or a Recipe of your own.
    data: real images to tune on instead of synthetic ones (see `gdfq.data.load_data`).
    test: labelled images; teacher and student are measured on them at the end, into the result's
        `metrics`, and they are used for nothing else. For a network that is no classifier they
        need no labels: the error of its outputs against the teacher's is measured.
    placement: "t1" or "full"; the recipe's own by default (see `gdfq.student.Scheme`).
    keep: layers of another width, as "stage1.*=float" or "last=8" (see `gdfq.student.Keep`).
    steps: batches in all; the recipe's own by default.
    mean, std: of the network's input normalisation, per channel, for pixels in 0..1.
    resize: how the files of an image folder get the network's size (see `gdfq.data.Resize`).
    device: "cpu", "cuda" or "auto".
    classifier: whether the output are logits of classes; by default, whether it is one tensor
        [N, C] with C >= 2. Any other network (detection, segmentation, regression) has no labels:
        its outputs themselves are matched, relative to their size.
    listener: is called with every `gdfq.progress.Step`.

    Raises UsageError for input that cannot be used, GdfqError for a run that fails.
    """
    widths = parse_bits(bits, size)
    recipe = find_recipe(recipe).with_steps(steps)
    recipe = replace(recipe, placement=_check_placement(placement or recipe.placement))
    clock = _Clock()

    if not isinstance(model, Captured):
        model = capture(model, example_input, classifier=classifier)
    teacher = model.to(find_device(device))
    preprocessing = Preprocessing.of(teacher.input_shape[0], mean, std, resize)
    source: Source = recipe.source
    if data is not None:
        given = load_data(data, teacher.input_shape, teacher.classes, preprocessing.resize)
        source = on_images(source, given, preprocessing)
    held_out = (
        None
        if test is None
        else load_data(test, teacher.input_shape, teacher.classes, preprocessing.resize)
    )
    if held_out is not None and held_out.labels is None and teacher.classes is not None:
        raise UsageError("test images need labels; these have none. Give (images, labels).")
    clock.lap("capture")

    card = Card(
        input_shape=teacher.input_shape,
        classes=teacher.classes,
        outputs=teacher.outputs,
        preprocessing=preprocessing,
        bits=widths,
        placement=recipe.placement,
        recipe=recipe.name,
        seed=seed,
        keep=tuple(keep),
    )
    scheme = Scheme(widths, recipe.placement, tuple(map(Keep.parse, keep)))
    metrics: dict[str, Any] = {}
    if size is not None:
        source, images = _with_images(source, teacher, seed, listener)
        chosen = choose_widths(
            teacher,
            scheme,
            images,
            size,
            metadata=metadata_of(card, dict.fromkeys(_MEASURED, 100.0), safe=False),
            listener=listener,
        )
        scheme = chosen.scheme
        card = replace(card, keep=tuple(map(str, scheme.keep)))
        metrics["allocation"] = {"size": size, "bytes": chosen.bytes, "widths": chosen.widths}
        clock.lap("allocate")

    seen = Remembering(source)
    network, examples = quantize_captured(
        teacher, scheme, recipe, seen, seed=seed, listener=listener, lap=clock.lap
    )

    metrics |= {"seconds": clock.seconds(), "steps": recipe.steps}
    tested = None
    if held_out is not None:
        metrics["test_images"] = len(held_out)
        if held_out.labels is not None and teacher.classes is not None:
            tested = _tested(teacher, network, held_out, preprocessing, listener)
            metrics |= {
                who: {"top1": round(answers.top1(tested.labels), 4)}
                for who, answers in (("teacher", tested.teacher), ("student", tested.student))
            }
        else:
            metrics["student"] = _compared(teacher, network, held_out, preprocessing, listener)
    metrics["float_bytes"] = sum(t.nbytes for t in tensors_of(teacher.network).values())
    return QuantizedNetwork(network, card, metrics, examples, seen.witness(teacher, tested))


def quantize_captured(
    teacher: Captured,
    scheme: Scheme,
    recipe: Recipe,
    source: Source,
    *,
    seed: int,
    listener: Listener = silent,
    lap: Callable[[str], None] | None = None,
) -> tuple[fx.GraphModule, Tensor]:
    """The heart of `quantize`: the frozen student of a captured teacher, on a source's batches.

    With it come a few images of the first batch [n, *input_shape]. `lap` is called with the name
    of each stage when it ends.
    """
    lap = lap or (lambda _: None)
    batches = source.stream(teacher, steps=recipe.steps, seed=seed, listener=listener)
    first = next(batches)
    examples, batches = first.images[:_EXAMPLES].clone(), chain([first], batches)
    tuning = recipe.tuning
    student = build_student(
        teacher,
        scheme,
        quantizers=recipe.quantizers,
        fixed_statistics=not isinstance(tuning, Distillation) or tuning.fixed_statistics,
    )
    calibration: Iterable[Batch] = islice(batches, recipe.calibration)
    if recipe.match_moments or isinstance(tuning, Reconstruction):
        calibration = list(calibration)
    calibrate_(student, calibration, steps=recipe.calibration, listener=listener)
    if recipe.match_moments:
        match_moments_(student, teacher, torch.cat([batch.images for batch in calibration]))
    lap("calibrate")
    if tuning is not None:
        waiting = islice(batches, recipe.warmup - recipe.calibration)
        for step, batch in enumerate(waiting, start=recipe.calibration + 1):
            listener(Step("warmup", step, recipe.warmup, batch.losses))  # the student waits
        lap("warmup")
        if isinstance(tuning, Reconstruction):
            held = islice(chain(calibration, batches), -(-tuning.images // source.batch))
            updates = recipe.steps - recipe.warmup
            reconstruct_(
                student, teacher, held, tuning, updates=updates, seed=seed, listener=listener
            )
        else:
            tune_(
                student,
                teacher,
                batches,
                tuning,
                first_step=recipe.warmup,
                total_steps=recipe.steps,
                listener=listener,
            )
        lap("tune")
    network = freeze(student)
    lap("freeze")
    return network, examples


def _tested(
    teacher: Captured,
    network: fx.GraphModule,
    held_out: ImageData,
    preprocessing: Preprocessing,
    listener: Listener,
) -> Tested:
    """What teacher and student, both classifiers, answer to labelled test images."""
    ask = partial(logits_of, device=teacher.device, listener=listener)
    answers = (
        Answers.of(ask(module, held_out, preprocessing)) for module in (teacher.network, network)
    )
    assert held_out.labels is not None
    return Tested(held_out, held_out.labels, *answers)


def _compared(
    teacher: Captured,
    network: fx.GraphModule,
    held_out: ImageData,
    preprocessing: Preprocessing,
    listener: Listener,
) -> dict[str, Any]:
    """The error of each of the student's outputs against the teacher's, on test images."""
    errors = output_errors(
        network,
        teacher.network,
        held_out,
        preprocessing,
        device=teacher.device,
        listener=listener,
    )
    rounded = (round(error, 4) for error in errors)
    return {"error_percent": dict(zip(output_names(teacher), rounded, strict=True))}


def generate(
    model: nn.Module,
    example_input: Tensor,
    count: int = 1024,
    recipe: str | Recipe = "fast",
    *,
    steps: int | None = None,
    seed: int = 0,
    device: str = "auto",
    classifier: bool | None = None,
    listener: Listener = silent,
) -> tuple[Tensor, Tensor | None]:
    """Synthetic images alone: [count, *input_shape] normalised floats, and their labels [count].

    A network whose outputs are not classes (see `quantize`) has no labels.

    The images of a pool are those that the recipe would tune on. Any other source runs the
    recipe's `steps`, or as many as `count` images need if that is more; the images are its last
    ones, when a generator has learned most. Raises UsageError and GdfqError
    as `quantize` does.
    """
    if count < 1:
        raise UsageError(f"count must be at least 1; got {count}.")
    recipe = find_recipe(recipe)
    teacher = capture(model, example_input, classifier=classifier).to(find_device(device))
    if isinstance(recipe.source, ImagePool):
        if steps is not None:
            raise UsageError(
                f"recipe {recipe.name!r} makes each image once, whatever its steps; "
                f"got steps={steps}. Leave steps away; it is for generators that learn."
            )
        made = recipe.source.source
        images, labels = collect(made, teacher, count, seed=seed, listener=listener)
        return images.cpu(), None if labels is None else labels.cpu()
    needed = -(-count // recipe.source.batch)
    total = max(recipe.steps if steps is None else steps, needed)
    kept: list[Batch] = []
    stream = recipe.source.stream(teacher, steps=total, seed=seed, listener=listener)
    for step, batch in enumerate(stream, start=1):
        listener(Step("generate", step, total, batch.losses))
        if step > total - needed:
            kept.append(batch)
    images, labels = first_images(count, kept)
    return images.cpu(), None if labels is None else labels.cpu()


def find_device(name: str) -> torch.device:
    """The device of a name; "auto" is the GPU if there is one. Raises UsageError otherwise."""
    available = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    if name == "auto":
        return torch.device(available[-1])
    if name not in available:
        raise UsageError(f"device must be one of auto, {', '.join(available)} here; got {name!r}.")
    return torch.device(name)


def parse_bits(bits: str | Bits, size: int | None) -> Bits:
    """The widths that are meant; of "auto" those that layers start from.

    Raises UsageError for text that says no widths, and for "auto" without a size or a size
    without "auto".
    """
    if (bits == AUTO) != (size is not None):
        raise UsageError(
            "bits 'auto' and a size belong together: widths are chosen to fit the size of the ONNX "
            f"file; got bits {str(bits)!r} and size {size}. Use as --bits auto --size 300KB."
        )
    if size is not None:
        if not isinstance(size, int) or size < 1:
            raise UsageError(f"size must be a whole number of bytes, at least 1; got {size!r}.")
        return BASE
    return bits if isinstance(bits, Bits) else Bits.parse(str(bits))


def _with_images(
    source: Source, teacher: Captured, seed: int, listener: Listener
) -> tuple[ImagePool, Tensor]:
    """The pool with its images made, and these: they serve the choice of widths and the tuning."""
    if not isinstance(source, ImagePool):
        raise UsageError(
            "bits 'auto' needs images before the student learns, and so a recipe with a pool of "
            f"them; this one's come from a {type(source).__name__} on the way. Use fast or quick."
        )
    return source.made(teacher, seed=seed, listener=listener)


def _check_placement(placement: Placement) -> Placement:
    if placement not in PLACEMENTS:
        raise UsageError(f"placement must be one of {', '.join(PLACEMENTS)}; got {placement!r}.")
    return placement


class _Clock:
    """Seconds of each stage, and their total."""

    def __init__(self) -> None:
        self._started = self._last = time.perf_counter()
        self._laps: dict[str, float] = {}

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self._laps[stage], self._last = now - self._last, now

    def seconds(self) -> dict[str, float]:
        laps = {"total": self._last - self._started, **self._laps}
        return {stage: round(seconds, 3) for stage, seconds in laps.items()}
