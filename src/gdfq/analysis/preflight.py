"""What will happen to a network, told before anything runs: counted from its graph."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx

from gdfq.deploy.onnx.sizes import WIDTHS
from gdfq.errors import GdfqError
from gdfq.functional.grid import Bits, Layout
from gdfq.graph import operators, queries
from gdfq.graph.batch_norms import fold_batch_norms
from gdfq.graph.capture import Captured
from gdfq.graph.outputs import output_names
from gdfq.graph.tensors import tensors_of
from gdfq.recipes import Recipe
from gdfq.student.build import check_scheme
from gdfq.student.placement import activation_bits, feeds_softmax_only, shapes_outputs
from gdfq.student.scheme import Scheme

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
class FloatOperators:
    """Operators of one kind that a runtime computes in float, all for the same reason."""

    operator: str
    count: int
    why: str


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
    float_operators: tuple[FloatOperators, ...]
    """Operators that a runtime computes in float, and why."""
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
    """What a recipe would do to a teacher, without a step of it."""
    folded = recipe.quantizers.prepared(teacher)
    nodes = list(folded.network.graph.nodes)
    layers = list(filter(queries.has_weight, nodes))
    problems: list[str] = []
    try:
        check_scheme(teacher, scheme, recipe.quantizers)
        widths = activation_bits(folded, scheme)
        weight_bits = scheme.weight_bits(layers)
    except GdfqError as error:
        problems, widths, weight_bits = [str(error)], {}, {}
    try:
        recipe.source.stream(teacher, steps=1)
    except GdfqError as error:
        problems.append(str(error))
    weights = {node: tensors_of(folded.network)[queries.weight_name(node)] for node in layers}
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
        float_operators=_float_operators(nodes, weight_bits, widths, scheme),
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
    return Layer(
        name=queries.layer_name(node),
        operator=operators.short_name(node),
        weight=tuple(weight.shape),
        operations=layer_operations(node, weight),
        bits=weight_bits.get(node),
        input_bits=widths.get(queries.grid_source(queries.input_of(node))),
    )


def layer_operations(node: fx.Node, weight: Tensor) -> int:
    """Multiply-accumulates of a convolution or linear layer for one image, borders counted."""
    layout, _ = queries.weight_layout(node)
    # Each output of a layer, each input of a transposed one, meets the rest of the weight.
    at = node if layout is Layout.ROWS else queries.input_of(node)
    return queries.numbers_per_image(at) * math.prod(weight.shape[1:])


def _product_operations(node: fx.Node) -> int:
    """Multiply-accumulates of a product of two activations for one image."""
    if operators.name_of(node) not in operators.PRODUCTS:
        return 0
    left = queries.input_of(node)
    return queries.numbers_per_image(node) * int(left.meta["val"].shape[-1])


def _stored_bytes(layer: Layer) -> int:
    """Of a layer in an ONNX file: codes in 2, 4 or 8 bits, scale, zero point, bias by channel."""
    count = math.prod(layer.weight)
    if layer.bits is None:
        return 4 * count
    container = min(width for width in WIDTHS if width >= layer.bits)
    return -(-count * container // 8) + 9 * layer.weight[0]


def _float_operators(
    nodes: list[fx.Node],
    weight_bits: Mapping[fx.Node, int],
    widths: Mapping[fx.Node, int],
    scheme: Scheme,
) -> tuple[FloatOperators, ...]:
    """What is computed in float, in the order in which it first comes."""
    tail = shapes_outputs(nodes)
    reasons: Counter[tuple[str, str]] = Counter()
    for node in nodes:
        why = _why_float(node, weight_bits, widths, scheme, node in tail)
        if why is not None:
            reasons[operators.short_name(node), why] += 1
    return tuple(FloatOperators(name, count, why) for (name, why), count in reasons.items())


def _why_float(
    node: fx.Node,
    weight_bits: Mapping[fx.Node, int],
    widths: Mapping[fx.Node, int],
    scheme: Scheme,
    is_tail: bool,
) -> str | None:
    """Why a runtime computes a node in float; None for one that it does not."""
    name = operators.name_of(node)
    vanishes = (
        queries.keeps_grid(node)
        or queries.is_rectifier(node)
        or name == operators.BATCH_NORM
        or feeds_softmax_only(node)
    )
    if not (operators.short_name(node) and queries.is_activation(node)) or vanishes:
        return None
    if name not in operators.INTEGER_CONSUMERS:
        return "no integer form"
    if queries.has_weight(node) and node not in weight_bits:
        return "kept float"
    sources = filter(queries.is_activation, node.all_input_nodes)
    if all(queries.grid_source(source) in widths for source in sources):
        return None
    if is_tail:
        return "only shapes the outputs"
    if scheme.placement == "relu":
        return "what enters it is no ReLU's output, which alone placement relu quantizes"
    return "what enters it stays float"


def _advice(bits: Bits, layers: tuple[Layer, ...], nodes: list[fx.Node]) -> Iterator[str]:
    narrow = [
        layer.name
        for layer, node in zip(layers, nodes, strict=True)
        if operators.name_of(node) in operators.CONVOLUTIONS
        and layer.weight[1] == 1
        and node.all_input_nodes[0].meta["val"].shape[1] > 1  # else a stem of one channel
        and layer.weight[0] <= _FEW_CHANNELS
    ]
    smallest = min(bits.weights, bits.activations)
    if narrow and smallest < 8:
        yield (
            f"depthwise layers of {_FEW_CHANNELS} channels or fewer lose most and gain no speed: "
            f"{', '.join(narrow)}. Keep them with --layer-bits NAME=float or =8."
        )
    if smallest == 2:
        yield "2 bits lost 14 points on a CIFAR-10 ResNet-20: expect a network of little use."
    elif smallest == 3:
        yield "3 bits lost 3 points on a CIFAR-10 ResNet-20 and 8 on a CIFAR-100 ResNet-56."
    elif smallest == 4:
        yield (
            "4 bits lost 1 point on a CIFAR-10 ResNet-20, 3 on a CIFAR-100 ResNet-56 and 11 on "
            "MobileNetV1 x0.25; wider activations (w4a8) cost no byte."
        )
