"""What a run would do to a network, counted from its graph before anything runs."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx

from gdfq.analysis.float_operators import FloatOperators, find_float_operators
from gdfq.analysis.operations import layer_operations, product_operations
from gdfq.analysis.preflight_advice import preflight_advice
from gdfq.deploy.onnx.sizes import WEIGHT_BITS
from gdfq.errors import GdfqError
from gdfq.functional.grid import Bits
from gdfq.graph import operators, queries
from gdfq.graph.batch_norms import batch_norm_of, fold_batch_norms
from gdfq.graph.capture import Captured
from gdfq.graph.ends import describe, output_names
from gdfq.graph.inputs import takes_images
from gdfq.graph.tensors import tensors_of
from gdfq.recipes import Recipe
from gdfq.student.assignment import check_scheme
from gdfq.student.placement import activation_bits, layer_input_bits, rounded_input
from gdfq.student.scheme import Scheme


@dataclass(frozen=True)
class Layer:
    """One convolution or linear layer.

    Attributes:
        name: Its name.
        operator: Its operator, such as "conv2d".
        weight: The shape of its weight.
        operations: Multiply-accumulates per image.
        bits: Bits of its weight; None for a float layer.
        input_bits: Bits of its input; None for a float input.
    """

    name: str
    operator: str
    weight: tuple[int, ...]
    operations: int
    bits: int | None
    input_bits: int | None


@dataclass(frozen=True)
class Diagnosis:
    """Facts about a network and a run on it.

    Attributes:
        input_shape: The shape of one input image; of a network with several inputs, of the first.
        inputs: All inputs in words.
        classes: Number of classes; None if the outputs are not classes.
        outputs: Names of the outputs.
        task: What is matched and measured of the outputs, in one sentence.
        bits: Default bits, such as "w4a8".
        placement: Placement of the quantizers.
        recipe: Name of the recipe.
        effort: Images and steps of the recipe at these bits.
        layers: All convolutions and linear layers.
        batch_norms: Number of batch norms.
        folded: Number of batch norms that are folded into the layer before them.
        activations: Number of quantized activations by their bits.
        float_operators: Operators that a runtime computes in float, with the reason.
        parameters: Number of parameters.
        operations: Multiply-accumulates per image, of layers and matrix products.
        float_bytes: Bytes of the network in float32 after batch-norm folding.
        quantized_bytes: Bytes of weights, scales and biases in an ONNX file, without its graph.
        problems: Reasons for which the run would fail at its start; usually empty.
        advice: What to expect at these bits, with advice.
        seconds: Estimated seconds by stage ("images" or "text", "tuning"); None if not measured.
        peak_bytes: Estimated peak memory of the run in bytes; None if not measured.
    """

    input_shape: tuple[int, ...]
    inputs: str
    classes: int | None
    outputs: tuple[str, ...]
    task: str
    bits: str
    placement: str
    recipe: str
    effort: str
    layers: tuple[Layer, ...]
    batch_norms: int
    folded: int
    activations: Mapping[int, int]
    float_operators: tuple[FloatOperators, ...]
    parameters: int
    operations: int
    float_bytes: int
    quantized_bytes: int
    problems: tuple[str, ...]
    advice: tuple[str, ...]
    seconds: Mapping[str, float] | None = None
    peak_bytes: int | None = None

    def as_values(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def summary(self) -> str:
        """A summary in one line."""
        quantized = sum(layer.bits is not None for layer in self.layers)
        kind = "floating-point bits" if Bits.parse(self.bits).float_activations else "bits"
        activations = ", ".join(f"{n} at {bits} {kind}" for bits, n in self.activations.items())
        return (
            f"{quantized} of {len(self.layers)} layers quantized, "
            f"activations: {activations or 'none'}; "
            f"{self.folded} of {self.batch_norms} batch norms fold; "
            f"{self.parameters / 1e6:.2f} M parameters, {self.operations / 1e6:.1f} M operations; "
            f"weights {self.float_bytes / 1024:.0f} KiB float, "
            f"about {self.quantized_bytes / 1024:.0f} KiB in an ONNX file"
        )


def diagnose(teacher: Captured, scheme: Scheme, recipe: Recipe) -> Diagnosis:
    """Find out what a recipe would do to a teacher, without running a step.

    Errors that the run would raise at its start are returned as `problems`.

    Args:
        teacher: The trained network.
        scheme: What is quantized, and to how many bits.
        recipe: The recipe, fitted to the input of the network.
    """
    folded = recipe.quantizers.prepared(teacher)
    nodes = list(folded.network.graph.nodes)
    layers = list(filter(queries.has_weight, nodes))
    problems: list[str] = []
    try:
        check_scheme(teacher, scheme, recipe.quantizers)
        output_bits = activation_bits(folded, scheme)
        entering = layer_input_bits(folded, scheme)
        weight_bits = scheme.weight_bits(layers)
    except GdfqError as error:
        problems, output_bits, entering, weight_bits = [str(error)], {}, {}, {}
    try:
        recipe.source.stream(teacher, steps=1)
    except GdfqError as error:
        problems.append(str(error))
    weights = {node: tensors_of(folded.network)[queries.weight_name(node)] for node in layers}
    input_bits = output_bits | entering
    found = tuple(_layer(node, weights[node], weight_bits, input_bits) for node in layers)
    tensors = tensors_of(teacher.network)
    norms = len(teacher.batch_norms)
    return Diagnosis(
        input_shape=teacher.inputs[0].shape,
        inputs=_inputs_in_words(teacher),
        classes=teacher.classes,
        outputs=tuple(output_names(teacher, teacher.ends)),
        task=_task(teacher),
        bits=str(scheme.bits),
        placement=scheme.placement,
        recipe=recipe.name,
        effort=recipe.effort_in_words,
        layers=found,
        batch_norms=norms,
        folded=norms - len(fold_batch_norms(teacher).batch_norms),
        activations=dict(sorted(Counter([*output_bits.values(), *entering.values()]).items())),
        float_operators=find_float_operators(nodes, weight_bits, output_bits, scheme),
        parameters=sum(t.numel() for t in tensors.values() if isinstance(t, torch.nn.Parameter)),
        operations=sum(layer.operations for layer in found) + sum(map(product_operations, nodes)),
        float_bytes=sum(t.nbytes for t in tensors_of(fold_batch_norms(teacher).network).values()),
        quantized_bytes=sum(map(_stored_bytes, found)) + _recurrent_bytes(folded),
        problems=tuple(problems),
        advice=()
        if teacher.vocabulary is not None  # what was measured is of networks of images
        else tuple(
            preflight_advice(
                scheme.bits,
                normalises_batches=any(map(queries.normalises_batch, nodes)),
                untrained=_is_untrained(teacher),
            )
        ),
    )


def _is_untrained(teacher: Captured) -> bool:
    """Return whether all running statistics are those that a batch norm begins with."""
    norms = [batch_norm_of(teacher, node) for node in teacher.batch_norms]
    return bool(norms) and all(
        bool((norm.mean == 0).all() and (norm.variance == 1).all()) for norm in norms
    )


def _inputs_in_words(teacher: Captured) -> str:
    """The shape of one image, or each input with its name, shape and kind."""
    if takes_images(teacher.inputs):
        return "x".join(map(str, teacher.input_shape))
    return ", ".join(map(str, teacher.inputs))


def _task(teacher: Captured) -> str:
    """Return what is matched and measured of the outputs, in one sentence."""
    if teacher.vocabulary is not None:
        return (
            f"logits of the next token of {teacher.vocabulary.size}, for any length up to "
            f"{teacher.vocabulary.length} tokens"
        )
    return describe(teacher, teacher.ends)


def _layer(
    node: fx.Node,
    weight: Tensor,
    weight_bits: Mapping[fx.Node, int],
    input_bits: Mapping[fx.Node, int],
) -> Layer:
    return Layer(
        name=queries.layer_name(node),
        operator=operators.short_name(node),
        weight=tuple(weight.shape),
        operations=layer_operations(node, weight),
        bits=weight_bits.get(node),
        input_bits=_input_bits(node, input_bits),
    )


def _input_bits(layer: fx.Node, input_bits: Mapping[fx.Node, int]) -> int | None:
    source = rounded_input(layer, input_bits)
    return None if source is None else input_bits[source]


def _recurrent_bytes(teacher: Captured) -> int:
    """Bytes of the weights of recurrent layers, which stay float."""
    names = {
        str(source.target)
        for node in teacher.network.graph.nodes
        if operators.name_of(node) in operators.RECURRENT
        for source in node.all_input_nodes
        if source.op == "get_attr"
    }
    tensors = tensors_of(teacher.network)
    return sum(tensors[name].nbytes for name in names)


def _stored_bytes(layer: Layer) -> int:
    """Bytes of a layer in an ONNX file.

    Codes take 2, 4 or 8 bits; scale, zero point and bias take 9 bytes per output channel.
    """
    count = math.prod(layer.weight)
    if layer.bits is None:
        return 4 * count
    container = min(bits for bits in WEIGHT_BITS if bits >= layer.bits)
    return -(-count * container // 8) + 9 * layer.weight[0]
