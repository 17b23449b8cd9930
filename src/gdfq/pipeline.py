"""The whole method, top to bottom: capture → source → student → calibrate → tune → freeze."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gdfq.analysis.accuracy import LABELS, output_errors
from gdfq.analysis.bit_allocation import choose_widths, file_sizes, parse_bits
from gdfq.analysis.observations import Tested, Witness
from gdfq.data.datasets import ImageData, load_data, summary_of
from gdfq.data.preprocessing import Preprocessing, Resize
from gdfq.deploy.card import Card
from gdfq.deploy.metadata import metadata_of
from gdfq.errors import GdfqWarning, UsageError
from gdfq.execution.checkpointer import Checkpointer, NullCheckpointer
from gdfq.execution.checkpoints import Checkpoints
from gdfq.execution.context import Context
from gdfq.execution.distributed import ALONE, Group
from gdfq.execution.guards import told_of_shortage
from gdfq.execution.precision import Precision, find_device
from gdfq.execution.progress import Listener, silent
from gdfq.execution.seeding import check_seed
from gdfq.execution.seeding import stream as random_stream
from gdfq.execution.stopwatch import Clock
from gdfq.execution.tracing import beside_no_tracing, giving_way
from gdfq.files.plain_values import frozen_values
from gdfq.files.states import Results, name_of
from gdfq.functional.grid import Bits
from gdfq.graph.capture import Captured, capture
from gdfq.graph.outputs import in_order, output_names
from gdfq.graph.tensors import tensors_of
from gdfq.models.registry import weights_hash
from gdfq.quantized import QuantizedNetwork
from gdfq.recipes import Recipe, find_recipe
from gdfq.sources.base import Batch, Source
from gdfq.sources.collapse import CollapsedError
from gdfq.sources.given import on_images
from gdfq.sources.stream import Feed
from gdfq.stages import STUDENT_PARTS, frozen_student
from gdfq.student.integer_network import IntegerNetwork
from gdfq.student.scheme import LayerBits, Scheme, parse_placement
from gdfq.version import __version__

_MEASURED = ("teacher", "student")
Data = str | Path | Tensor | tuple[Tensor, Tensor] | ImageData


@beside_no_tracing
def quantize(
    model: nn.Module | Captured,
    example_input: Tensor,
    bits: str | Bits = "w4a4",
    recipe: str | Recipe = "fast",
    *,
    size: int | None = None,
    data: Data | None = None,
    test: Data | None = None,
    placement: str | None = None,
    keep: Sequence[str] = (),
    steps: int | None = None,
    batch: int | None = None,
    seed: int = 0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    resize: Resize | None = None,
    device: str = "auto",
    classifier: bool | None = None,
    listener: Listener = silent,
    checkpoints: str | Path | Checkpoints | None = None,
    precision: Precision = "float32",
    group: Group = ALONE,
) -> QuantizedNetwork:
    """Quantize a trained network; without `data` no real image is used.

    model: any nn.Module that maps images to logits, or to other tensors (see `classifier`), or
        a `gdfq.graph.capture.Captured`, which was captured before; it is not changed.
    example_input: [N, C, H, W], one input or more as the network takes them (normalised).
    bits: widths of weights and activations, 2..8 each, as "w4a4"; or "auto", which chooses each
        layer's so that the ONNX file is no larger than `size` bytes (see
        `gdfq.analysis.bit_allocation`).
    recipe: a name in `gdfq.RECIPES` or a Recipe of your own.
    data: real images to tune on instead of synthetic ones (see `gdfq.data.datasets.load_data`).
    test: labelled images; teacher and student are measured on them at the end, into the result's
        `metrics`, and they are used for nothing else. For a network that is no classifier they
        need no labels: the error of its outputs against the teacher's is measured.
    placement: "relu" or "full"; the recipe's own by default (see `gdfq.student.scheme.Scheme`).
    keep: layers with other bits, as "stage1.*=float" or "last=8".
    steps: batches in all; the recipe's own by default.
    batch: images a step; the recipe's own by default.
    mean, std: of the network's input normalisation, per channel, for pixels in 0..1.
    resize: how the files of an image folder get the network's size (see
    `gdfq.data.datasets.Resize`). device: "cpu", "cuda" or "auto".
    classifier: whether the output are logits of classes; by default, whether it is one tensor
        [N, C] with C >= 2. Any other network (detection, segmentation, regression) has no labels:
        its outputs themselves are matched, relative to their size.
    listener: is called with every `gdfq.execution.progress.Step`.
    checkpoints: a folder that the run writes its state into about once a minute, and whenever the
        listener raises. The same call with a folder that has one goes on from there, and ends with
        the same bits. It stays when the run has finished; while one run uses it another is refused.
    precision: "bfloat16" for less precision of the products in layers while images are made and
        the student is tuned.
    group: the processes that do it together (`gdfq.execution.distributed.joined`), all of which
        call this alike; the first alone measures on `test` and writes checkpoints.

    Raises UsageError for input that cannot be used, GdfqError for a run that fails.
    """
    widths = parse_bits(bits, size)
    recipe = find_recipe(recipe).with_steps(steps)
    recipe = replace(recipe, placement=parse_placement(placement or recipe.placement))
    check_seed(seed)
    clock = Clock()

    keeper: Checkpointer = NullCheckpointer()
    if checkpoints is not None:
        keeper = Checkpoints.of(checkpoints, writes=group.rank == 0)
    if not isinstance(model, Captured):
        model = capture(model, example_input, classifier=classifier)
    teacher = model.to(find_device(device))
    recipe = recipe.fitted(teacher.input_shape).with_batch(batch)
    preprocessing = Preprocessing.of(teacher.input_shape[0], mean, std, resize)
    source: Source = recipe.source
    given: ImageData | None = None
    if data is not None:
        given = load_data(data, teacher.input_shape, teacher.classes, preprocessing.resize)
        source = on_images(source, given, preprocessing)
    held_out = None if test is None else load_test(test, teacher, preprocessing.resize)
    clock.lap("capture")

    card = Card(
        inputs=teacher.inputs,
        classes=teacher.classes,
        outputs=teacher.outputs,
        preprocessing=preprocessing,
        bits=widths,
        placement=recipe.placement,
        recipe=recipe.name,
        seed=seed,
        layer_bits=tuple(keep),
    )
    scheme = Scheme(widths, recipe.placement, tuple(map(LayerBits.parse, keep)))
    run = _Run(teacher, recipe, source, scheme, card, size, held_out)
    with keeper:
        context = Context(
            seed=seed,
            listener=giving_way(keeper.listening(listener)),
            group=group,
            checkpointer=keeper,
            precision=precision,
        )
        keeper.begin(*_identity(run, given, context))
        group.wait()  # nothing is written before all have read
        return _carried_out(run, clock, context)


def load_test(test: Data, teacher: Captured, resize: Resize) -> ImageData:
    """Test images for a network. Raises UsageError for what cannot be used or lacks labels."""
    images = load_data(test, teacher.input_shape, teacher.classes, resize)
    if images.labels is None and teacher.classes is not None:
        raise UsageError(f"test images need labels; these have none. {LABELS}")
    return images


@dataclass(frozen=True, eq=False)
class _Run:
    """What is to be done, checked."""

    teacher: Captured
    recipe: Recipe
    source: Source
    scheme: Scheme
    card: Card
    size: int | None
    held_out: ImageData | None


def _carried_out(run: _Run, clock: Clock, context: Context) -> QuantizedNetwork:
    """All stages, each of which goes on where the keeper's parts are."""
    teacher, recipe, group = run.teacher, run.recipe, context.group
    keeper, listener = context.checkpointer, context.listener
    scheme, card = run.scheme, run.card
    keeper.register("clock", clock)
    origin = keeper.register("origin", Results(seed=card.seed))
    if recipe.tuning.trains:
        group.check_batch(run.source.batch, f"recipe {recipe.name}")

    def from_seed(seed: int) -> Context:
        return replace(context, seed=seed)

    stream = partial(run.source.stream, teacher, steps=recipe.steps)
    feed = keeper.register("feed", Feed(stream(context=from_seed(origin["seed"])), teacher.device))
    metrics: dict[str, Any] = {}
    if run.size is not None:
        chosen = keeper.register("allocation", Results())
        if not chosen:
            chosen.update(
                _allocated(teacher, scheme, run.source, feed.stream, run.size, card, listener)
            )
            clock.lap("allocate")
            keeper.stage_ends()
        card = replace(card, layer_bits=tuple(chosen["keep"]))
        scheme = replace(scheme, layer_bits=tuple(map(LayerBits.parse, card.layer_bits)))
        metrics["allocation"] = chosen["metrics"]

    make = partial(
        frozen_student,
        teacher,
        scheme,
        recipe,
        lap=clock.lap,
    )
    network: IntegerNetwork | None = None
    while network is None:
        try:
            with told_of_shortage(run.source.most_at_once, partial(_pass_through, teacher)):
                network, scaled = make(feed, context=from_seed(origin["seed"]))
        except CollapsedError as error:
            _choose_another_seed_(origin, card.seed, error)
            keeper.unregister("feed", *STUDENT_PARTS, *recipe.tuning.parts)
            feed = keeper.register(
                "feed", Feed(stream(context=from_seed(origin["seed"])), teacher.device)
            )
    if "collapsed" in origin:
        metrics["collapsed"] = origin["collapsed"]

    metrics |= {"seconds": clock.seconds(), "steps": recipe.steps}
    tested = None
    if run.held_out is not None and group.rank == 0:
        metrics["test_images"] = len(run.held_out)
        if run.held_out.labels is not None and teacher.classes is not None:
            tested = Tested.of(teacher, network, run.held_out, card.preprocessing, listener)
            metrics |= {
                who: {"top1": round(answers.top1(tested.labels), 4)}
                for who, answers in (("teacher", tested.teacher), ("student", tested.student))
            }
        else:
            metrics["student"] = _compared(
                teacher, network, run.held_out, card.preprocessing, listener
            )
    metrics["float_bytes"] = sum(t.nbytes for t in tensors_of(teacher.network).values())
    witness = Witness(*(feed.recent.images() or (feed.examples, None)), scaled, tested)
    return QuantizedNetwork(network, card, metrics, feed.examples, witness)


def _compared(
    teacher: Captured,
    network: IntegerNetwork,
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


def _identity(
    run: _Run, given: ImageData | None, context: Context
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Which run it is, in plain values, and what its rounding depends on."""
    network = run.teacher.network
    return {
        "gdfq": __version__,
        "network": [weights_hash(network), name_of(network.code.encode())],
        "data": None if given is None else summary_of(given),
        "size": run.size,
        "recipe": frozen_values(run.recipe),
        "card": frozen_values(run.card),
        "precision": context.precision,
    }, {
        "torch": torch.__version__,
        "device": str(run.teacher.device),
        "threads": torch.get_num_threads(),
        "processes": context.group.size,
    }


def _allocated(
    teacher: Captured,
    scheme: Scheme,
    source: Source,
    stream: Iterator[Batch],
    size: int,
    card: Card,
    listener: Listener,
) -> dict[str, Any]:
    """The widths that are chosen to fit a size: what is kept, and the metrics that say so."""
    metadata = metadata_of(card, dict.fromkeys(_MEASURED, 100.0), safe=False)
    sizes = file_sizes(teacher, scheme, metadata)
    sizes.check(size)  # before the images are made, which takes long
    images = source.images_of(stream)
    chosen = choose_widths(teacher, scheme, images, size, sizes, listener=listener)
    return {
        "keep": list(map(str, chosen.scheme.layer_bits)),
        "metrics": {"size": size, "bytes": chosen.bytes, "widths": dict(chosen.widths)},
    }


def _choose_another_seed_(origin: Results, seed: int, error: CollapsedError) -> None:
    """Note a seed to begin again from. Raises CollapsedError when that was done before."""
    if "collapsed" in origin:
        raise CollapsedError(
            f"{error} So it did from another seed: {origin['collapsed']} "
            "Use a recipe without a generator, such as fast."
        ) from error
    origin["collapsed"] = str(error)
    origin["seed"] = random_stream(seed, "another seed").initial_seed()
    warnings.warn(f"{error} It begins again, from another seed.", GdfqWarning, stacklevel=3)


def _pass_through(teacher: Captured, images: int) -> None:
    """Forward and backward of so many images, as a step on them does."""
    inputs = torch.zeros(images, *teacher.input_shape, device=teacher.device, requires_grad=True)
    with torch.enable_grad():
        torch.stack([output.sum() for output in in_order(teacher.network(inputs))]).sum().backward()
