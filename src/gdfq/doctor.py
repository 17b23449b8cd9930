"""What will happen to a network, told before anything runs.

Sizes and operations are counted from the graph; time and memory are measured on one step of each
stage of the recipe and multiplied.
"""

import math
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from gdfq import operators
from gdfq.artifacts.onnx import WIDTHS
from gdfq.capture import Captured, tensors_of
from gdfq.errors import GdfqError
from gdfq.folding import fold_batch_norms
from gdfq.grid import Bits, Layout
from gdfq.outputs import output_names
from gdfq.progress import Step, silent
from gdfq.randomness import stream as random_stream
from gdfq.recipes import Recipe
from gdfq.sources import Batch, Source, labels_in_turn
from gdfq.sources.pool import ImagePool
from gdfq.student import Scheme, activation_widths, build_student, feeds_softmax_only
from gdfq.tuning.calibrate import calibrate_
from gdfq.tuning.distill import tune_
from gdfq.tuning.reconstruct import Reconstruction, reconstruct_

_FEW_CHANNELS = 16
"""A depthwise layer of so few channels loses most, and is slow in integer kernels."""


@dataclass(frozen=True)
class Layer:
    """One convolution or linear layer."""

    name: str
    operator: str
    weight: tuple[int, ...]
    operations: int
    """Multiply-accumulates an image."""
    bits: int | None
    """Of its weight; None for a layer that is kept in float."""
    input_bits: int | None
    """Of what enters it; None where that stays float."""


@dataclass(frozen=True)
class Diagnosis:
    """What was found out about a network and a run on it."""

    input_shape: tuple[int, ...]
    classes: int | None
    outputs: tuple[str, ...]
    bits: str
    placement: str
    recipe: str
    layers: tuple[Layer, ...]
    batch_norms: int
    folded: int
    """Batch norms that become part of the layer before them."""
    activations: Mapping[int, int]
    """Quantized activations, by their width."""
    float_operators: Mapping[str, int]
    """Operators that a runtime computes in float."""
    parameters: int
    operations: int
    float_bytes: int
    quantized_bytes: int
    """Of weights, scales and biases in an ONNX file; its graph comes on top."""
    problems: tuple[str, ...]
    """Why the run would end at once; none if it would not."""
    advice: tuple[str, ...]
    seconds: Mapping[str, float] | None = None
    """Of making images and of tuning, estimated from one step of each; None if not measured."""
    peak_bytes: int | None = None
    """Of this process after these steps, with the images that the run will hold."""

    def as_values(self) -> dict[str, Any]:
        """The same as plain values, for JSON."""
        return asdict(self)

    def summary(self) -> str:
        """The short form, one line."""
        quantized = sum(layer.bits is not None for layer in self.layers)
        widths = ", ".join(f"{count} at {bits} bits" for bits, count in self.activations.items())
        return (
            f"{quantized} of {len(self.layers)} layers quantized, activations: {widths or 'none'}; "
            f"{self.folded} of {self.batch_norms} batch norms fold; "
            f"{self.parameters / 1e6:.2f} M parameters, {self.operations / 1e6:.1f} M operations; "
            f"weights {self.float_bytes / 1024:.0f} KiB float, "
            f"about {self.quantized_bytes / 1024:.0f} KiB quantized"
        )


def diagnose(teacher: Captured, scheme: Scheme, recipe: Recipe) -> Diagnosis:
    """What a recipe would do to a teacher, without running any of it."""
    folded = fold_batch_norms(teacher) if recipe.quantizers != "min-max" else teacher
    nodes = list(folded.network.graph.nodes)
    layers = list(filter(operators.has_weight, nodes))
    problems: list[str] = []
    try:
        build_student(teacher, scheme, quantizers=recipe.quantizers)
        widths = activation_widths(folded, scheme)
        weight_bits = scheme.weight_bits(layers)
    except GdfqError as error:
        problems, widths, weight_bits = [str(error)], {}, {}
    try:
        recipe.source.stream(teacher, steps=1, seed=0)
    except GdfqError as error:
        problems.append(str(error))
    weights = {node: tensors_of(folded.network)[str(node.args[1].target)] for node in layers}
    found = tuple(_layer(node, weights[node], weight_bits, widths) for node in layers)
    tensors = tensors_of(teacher.network)
    norms = len(teacher.batch_norms)
    return Diagnosis(
        input_shape=teacher.input_shape,
        classes=teacher.classes,
        outputs=tuple(output_names(teacher)),
        bits=str(scheme.bits),
        placement=scheme.placement,
        recipe=recipe.name,
        layers=found,
        batch_norms=norms,
        folded=norms - len(fold_batch_norms(teacher).batch_norms),
        activations=dict(sorted(Counter(widths.values()).items())),
        float_operators=dict(Counter(_computed_in_float(nodes, weight_bits, widths))),
        parameters=sum(t.numel() for t in tensors.values() if isinstance(t, torch.nn.Parameter)),
        operations=sum(layer.operations for layer in found) + sum(map(_product_operations, nodes)),
        float_bytes=sum(t.nbytes for t in tensors_of(fold_batch_norms(teacher).network).values()),
        quantized_bytes=sum(map(_stored_bytes, found)),
        problems=tuple(problems),
        advice=tuple(_advice(scheme.bits, found, layers)),
    )


def _layer(
    node: fx.Node,
    weight: Tensor,
    weight_bits: Mapping[fx.Node, int],
    widths: Mapping[fx.Node, int],
) -> Layer:
    x = node.args[0]
    assert isinstance(x, fx.Node)
    return Layer(
        name=operators.layer_name(node),
        operator=operators.name_of(node).split(".")[1],
        weight=tuple(weight.shape),
        operations=layer_operations(node, weight),
        bits=weight_bits.get(node),
        input_bits=widths.get(operators.grid_source(x)),
    )


def layer_operations(node: fx.Node, weight: Tensor) -> int:
    """Multiply-accumulates of a convolution or linear layer for one image, borders counted."""
    x = node.args[0]
    assert isinstance(x, fx.Node)
    layout, _ = operators.weight_layout(node)
    # Each output of a layer, each input of a transposed one, meets the rest of the weight.
    at = node if layout is Layout.ROWS else x
    return operators.numbers_per_image(at) * math.prod(weight.shape[1:])


def _product_operations(node: fx.Node) -> int:
    """Multiply-accumulates of a product of two activations for one image."""
    if operators.name_of(node) not in operators.PRODUCTS:
        return 0
    left = node.args[0]
    assert isinstance(left, fx.Node)
    return operators.numbers_per_image(node) * int(left.meta["val"].shape[-1])


def _stored_bytes(layer: Layer) -> int:
    """Of a layer in an ONNX file: codes in 2, 4 or 8 bits, scale, zero point, bias by channel."""
    count = math.prod(layer.weight)
    if layer.bits is None:
        return 4 * count
    container = min(width for width in WIDTHS if width >= layer.bits)
    return -(-count * container // 8) + 9 * layer.weight[0]


def _computed_in_float(
    nodes: list[fx.Node], weight_bits: Mapping[fx.Node, int], widths: Mapping[fx.Node, int]
) -> Iterator[str]:
    """Operators that have no integer form, or whose inputs are on no grid."""
    for node in nodes:
        name = operators.name_of(node)
        if not (name.startswith("aten.") and operators.is_activation(node)):
            continue
        sources = filter(operators.is_activation, node.all_input_nodes)
        on_grid = all(operators.grid_source(source) in widths for source in sources)
        kept = operators.has_weight(node) and node not in weight_bits
        of_integers = name in operators.INTEGER_CONSUMERS and on_grid and not kept
        vanishes = (
            operators.keeps_grid(node)
            or operators.is_rectifier(node)
            or name == operators.BATCH_NORM
            or feeds_softmax_only(node)
        )
        if not (of_integers or vanishes):
            yield name.split(".")[1]


def _advice(bits: Bits, layers: tuple[Layer, ...], nodes: list[fx.Node]) -> Iterator[str]:
    narrow = [
        layer.name
        for layer, node in zip(layers, nodes, strict=True)
        if operators.name_of(node) in operators.CONVOLUTIONS
        and layer.weight[1] == 1
        and layer.weight[0] <= _FEW_CHANNELS
    ]
    smallest = min(bits.weights, bits.activations)
    if narrow and smallest < 8:
        yield (
            f"depthwise layers of {_FEW_CHANNELS} channels or fewer lose most and gain no speed: "
            f"{', '.join(narrow)}. Keep them with --keep NAME=float or =8."
        )
    if smallest == 2:
        yield "2 bits lost 30 points on a CIFAR-10 ResNet-20: expect a network of little use."
    elif smallest == 3:
        yield "3 bits lost 3 points on a CIFAR-10 ResNet-20 and more on larger tasks."
    elif smallest == 4:
        yield (
            "4 bits lost 1 point on a CIFAR-10 ResNet-20, 4 on a CIFAR-100 ResNet-56 and 18 on "
            "MobileNetV1 x0.25; wider activations (w4a8) cost no byte."
        )


def with_costs(
    diagnosis: Diagnosis, teacher: Captured, scheme: Scheme, recipe: Recipe
) -> Diagnosis:
    """The diagnosis with time and memory, measured on one step of each stage on this device."""
    if diagnosis.problems:
        return diagnosis
    seconds = {
        "images": _source_seconds(recipe.source, teacher, recipe.steps),
        "tuning": _tuning_seconds(teacher, scheme, recipe),
    }
    kilo = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilo
    held = recipe.source.images if isinstance(recipe.source, ImagePool) else 0
    peak += 4 * held * math.prod(teacher.input_shape)
    return replace(diagnosis, seconds=seconds, peak_bytes=peak)


class _EnoughError(Exception):
    """Raised by a stopwatch that has seen what it wanted."""


class _Stopwatch:
    """A listener that times the second event and knows how many there would be."""

    def __init__(self) -> None:
        self.seconds, self.total = 0.0, 0
        self._last: float | None = None

    def __call__(self, step: Step) -> None:
        now = time.perf_counter()
        if self._last is not None:
            self.seconds, self.total = now - self._last, step.total
            raise _EnoughError
        self._last = now


def _source_seconds(source: Source, teacher: Captured, steps: int) -> float:
    """Of a whole stream: the second iteration, or else the second batch, times their number."""
    if isinstance(source, ImagePool):
        return _source_seconds(source.source, teacher, -(-source.images // source.source.batch))
    watch = _Stopwatch()
    stream = source.stream(teacher, steps=max(2, steps), seed=0, listener=watch)
    try:
        next(stream)
        started = time.perf_counter()
        next(stream)
    except _EnoughError:
        return watch.seconds * watch.total
    return (time.perf_counter() - started) * steps


def _tuning_seconds(teacher: Captured, scheme: Scheme, recipe: Recipe) -> float:
    """The second update, times their number, on noise."""
    if recipe.tuning is None:
        return 0.0
    count = recipe.source.batch
    noise = torch.randn(count, *teacher.input_shape, generator=random_stream(0, "doctor.noise"))
    batch = Batch(noise.to(teacher.device), labels_in_turn(teacher, 0, count), None)
    student = build_student(teacher, scheme, quantizers=recipe.quantizers)
    calibrate_(student, [batch], steps=1, listener=silent)
    updates = recipe.steps - recipe.warmup
    if isinstance(recipe.tuning, Reconstruction):
        started = time.perf_counter()
        reconstruct_(student, teacher, [batch], recipe.tuning, updates=1, seed=0, listener=silent)
        return (time.perf_counter() - started) * updates
    watch = _Stopwatch()
    with suppress(_EnoughError):
        tune_(
            student,
            teacher,
            [batch, batch],
            recipe.tuning,
            first_step=recipe.warmup,
            total_steps=recipe.steps,
            listener=watch,
        )
    return watch.seconds * updates
