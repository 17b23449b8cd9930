"""The student: a trainable copy of the teacher's graph with fake quantizers in it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from glob import escape
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, fx, nn

from gdfq import operators
from gdfq.capture import Captured, tensors_of
from gdfq.errors import UsageError
from gdfq.features import WithFeatures, with_features
from gdfq.folding import fold_batch_norms
from gdfq.grid import MAX_BITS, MIN_BITS, Bits, code_bounds
from gdfq.quantizers import ActivationQuantizer, WeightQuantizer
from gdfq.quantizers.again import making_again
from gdfq.quantizers.learned import LearnedRange, LearnedWeight
from gdfq.quantizers.minmax import MinMaxWeight, MovingRange
from gdfq.quantizers.rounding import RoundedWeight
from gdfq.statistics import BatchNorm, batch_norm_of

ACTIVATION, WEIGHT, BATCH_NORM = "fake_activation", "fake_weight", "student_batch_norm"
"""Where the student keeps its quantizers and batch norms."""

Placement = Literal["t1", "full"]
PLACEMENTS: tuple[Placement, ...] = ("t1", "full")

Quantizers = Literal["min-max", "learned", "rounded"]
ACTIVATION_QUANTIZERS: dict[Quantizers, type[MovingRange] | type[LearnedRange]] = {
    "min-max": MovingRange,
    "learned": LearnedRange,
    "rounded": LearnedRange,
}

_SIGNAL_BITS = 8
"""Width, in `full` placement, of the network's input, of the outputs of layers without a ReLU, and
of sums that are only added to: what a residual path carries."""
_PLACES = ("first", "last")
"""Patterns that are places in the network rather than names."""


@dataclass(frozen=True)
class Keep:
    """Layers that are kept at another width, with the activations that enter them alone.

    pattern: of the names of layers' modules, as `fnmatch` has it, or `first` or `last`.
    bits: 2..8, or None for float.
    """

    pattern: str
    bits: int | None

    @classmethod
    def parse(cls, text: str) -> "Keep":
        """Read `stage1.*=8` or `last=float`. Raises UsageError for anything else."""
        pattern, _, width = text.rpartition("=")
        if pattern and width == "float":
            return cls(pattern, None)
        if pattern and width in map(str, range(MIN_BITS, MAX_BITS + 1)):
            return cls(pattern, int(width))
        raise UsageError(
            "what is kept is written PATTERN=float, or PATTERN=BITS with 2..8 bits, as "
            f"'stage1.*=float' or last=8; got {text!r}."
        )

    @classmethod
    def exactly(cls, name: str, bits: int) -> "Keep":
        """That layer alone, whatever its name is."""
        pattern = escape(name)
        return cls(f"[{name[0]}]{name[1:]}" if name in _PLACES else pattern, bits)

    def __str__(self) -> str:
        return f"{self.pattern}={'float' if self.bits is None else self.bits}"

    def fits(self, name: str, index: int, count: int) -> bool:
        """Whether a layer is meant: its name, and which of how many it is."""
        if self.pattern in _PLACES:
            return index == (0 if self.pattern == "first" else count - 1)
        return fnmatchcase(name, self.pattern)


@dataclass(frozen=True)
class Scheme:
    """What is quantized, and to how many bits.

    placement "t1" (the protocol of the published tables): all weights; of the activations only
    the outputs of ReLUs. "full" (deployable): all weights, and every tensor that enters a
    convolution, linear layer, addition, multiplication, concatenation or pooling, and every
    convolution or linear output without a ReLU; the network's outputs stay float.
    keep: layers of another width; the first that fits a layer counts.
    """

    bits: Bits
    placement: Placement
    keep: tuple[Keep, ...] = ()

    def kept(self, layers: Sequence[fx.Node]) -> dict[fx.Node, Keep]:
        """The layers that are kept at another width, and what says so.

        Raises UsageError for a pattern that fits no layer.
        """
        names = [operators.layer_name(layer) for layer in layers]
        for keep in self.keep:
            if not any(keep.fits(name, index, len(names)) for index, name in enumerate(names)):
                raise UsageError(
                    "keep must name layers of the network, or be first or last; "
                    f"{keep.pattern!r} fits none of: {', '.join(names)}."
                )
        chosen = {}
        for index, (layer, name) in enumerate(zip(layers, names, strict=True)):
            fitting = [keep for keep in self.keep if keep.fits(name, index, len(names))]
            if fitting:
                chosen[layer] = fitting[0]
        return chosen

    def weight_bits(self, layers: Sequence[fx.Node]) -> dict[fx.Node, int]:
        """The width of each layer's weight; layers that stay float have none.

        Raises UsageError for a pattern that fits no layer.
        """
        kept = self.kept(layers)
        widths = {
            layer: kept[layer].bits if layer in kept else self.bits.weights for layer in layers
        }
        return {layer: bits for layer, bits in widths.items() if bits is not None}


class StudentBatchNorm(nn.Module):
    """Batch norm whose affine parameters, if any, train; statistics are fixed (FBNS) or follow."""

    mean: Tensor
    variance: Tensor

    def __init__(self, norm: BatchNorm, fixed_statistics: bool) -> None:
        super().__init__()
        kind = nn.Parameter if norm.affine else nn.Buffer
        self.weight = kind(norm.weight.detach().clone())
        self.bias = kind(norm.bias.detach().clone())
        self.register_buffer("mean", norm.mean.clone())
        self.register_buffer("variance", norm.variance.clone())
        self.eps, self.fixed_statistics = norm.eps, fixed_statistics

    def forward(self, x: Tensor) -> Tensor:
        follows = self.training and not self.fixed_statistics
        return F.batch_norm(
            x, self.mean, self.variance, self.weight, self.bias, follows, eps=self.eps
        )

    def current(self) -> BatchNorm:
        """Its present values, detached."""
        weight, bias = self.weight.detach(), self.bias.detach()
        affine = isinstance(self.weight, nn.Parameter)
        return BatchNorm(weight, bias, self.mean, self.variance, self.eps, affine)


class Student(nn.Module):
    """The trainable student: [N, *input_shape] -> what the teacher returns.

    Its graph keeps the teacher's nodes; the quantizer of an activation is the submodule
    `fake_activation.<node>`, that of a weight `fake_weight.<node>`.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__()
        self.network = graph_module

    def forward(self, images: Tensor) -> Any:
        with making_again():
            return self.network(images)

    def named(self, names: Sequence[str]) -> list[fx.Node]:
        """The student's nodes whose values stand for the teacher's nodes of these names."""
        nodes = {node.name: node for node in self.network.graph.nodes}
        modules = {str(node.target): node for node in nodes.values() if node.op == "call_module"}
        found = nodes | {
            target.removeprefix(f"{kind}."): node
            for kind in (BATCH_NORM, ACTIVATION)  # a quantized batch norm is found quantized
            for target, node in modules.items()
            if target.startswith(f"{kind}.")
        }
        return [found[name] for name in names]

    def with_features(self, names: Sequence[str]) -> WithFeatures:
        """The student with its values, as quantized, of the teacher's nodes of these names.

        For tuning, when the ranges are known: ReLUs in front of grids that clamp as they do are
        left out, which saves passes over memory and changes nothing.
        """
        network = with_features(self.network, self.named(names))
        _leave_out_rectifiers_(network)

        def ask(images: Tensor) -> tuple[Any, Sequence[Tensor]]:
            with making_again():
                found: tuple[Any, Sequence[Tensor]] = network(images)
                return found

        return ask

    @property
    def activations(self) -> Iterator[ActivationQuantizer]:
        """All activation quantizers."""
        return (module for module in self.modules() if isinstance(module, ActivationQuantizer))

    def ranges(self) -> dict[str, float]:
        """How much the grid of each quantized activation spans, by the name of its node."""
        return {
            name.rpartition(".")[2]: float(module.grid()[0]) * (2**module.bits - 1)
            for name, module in self.named_modules()
            if isinstance(module, ActivationQuantizer)
        }


def _leave_out_rectifiers_(network: fx.GraphModule) -> None:
    """Let each grid that starts at zero, and passes no gradient below it, stand for its ReLU."""
    for node in network.graph.nodes:
        quantizer = network.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not isinstance(quantizer, LearnedRange):
            continue
        (source,) = node.all_input_nodes
        starts_at_zero = float(quantizer.zero_point) == code_bounds(quantizer.bits)[0]
        if (
            operators.name_of(source) == "aten.relu.default"
            and list(source.users) == [node]
            and starts_at_zero
        ):
            node.replace_input_with(source, source.all_input_nodes[0])
            network.graph.erase_node(source)
    network.recompile()


def activation_widths(teacher: Captured, scheme: Scheme) -> dict[fx.Node, int]:
    """The nodes of the teacher's graph whose outputs are quantized, and to how many bits."""
    nodes = list(teacher.network.graph.nodes)
    layers = list(filter(operators.has_weight, nodes))
    weight_bits = scheme.weight_bits(layers)
    widths = dict.fromkeys(layers, None) | weight_bits
    kept = {layer: bits for layer, bits in widths.items() if bits != scheme.bits.weights}
    if scheme.placement == "t1":
        found = {n: scheme.bits.activations for n in nodes if operators.is_rectifier(n)}
    else:
        found = _full_placement(nodes, scheme, floats=set(layers) - set(weight_bits))
    for node in list(found):
        entered = _entered(node)
        if entered and all(layer in kept for layer in entered):
            wanted = [kept[layer] for layer in entered]
            if all(bits is None for bits in wanted):
                del found[node]
            elif None not in wanted:
                found[node] = max(found[node], *(bits for bits in wanted if bits is not None))
    return found


def _full_placement(
    nodes: list[fx.Node], scheme: Scheme, floats: set[fx.Node]
) -> dict[fx.Node, int]:
    tail = shapes_outputs(nodes)
    wanted = {
        operators.grid_source(source)
        for node in nodes
        if operators.name_of(node) in operators.INTEGER_CONSUMERS
        and not feeds_softmax_only(node)
        and node not in tail
        for source in node.all_input_nodes
        if operators.is_activation(source)
    }
    weighted = [node for node in nodes if operators.name_of(node) in operators.WEIGHTED]
    wanted |= {
        _after_batch_norm(node)
        for node in weighted
        if node not in floats
        and not _feeds_rectifier_only(node)
        and not tail.issuperset(node.users)
    }
    signals = _input_signals(nodes) | {_after_batch_norm(node) for node in weighted}
    carriers = {node for node in nodes if _carries_on(node)}
    joined = {node for node in carriers if operators.name_of(node) in operators.JOINS}
    signals |= carriers
    signals |= {operators.grid_source(part) for node in joined for part in node.all_input_nodes}
    return {
        node: _SIGNAL_BITS if node in signals else scheme.bits.activations
        for node in nodes
        if node in wanted
    }


def shapes_outputs(nodes: list[fx.Node]) -> set[fx.Node]:
    """The nodes that only shape the network's outputs, behind the last layers: they stay float.

    A sigmoid of scores or the arithmetic of boxes, say, up to the outputs themselves.
    """
    computes = operators.WEIGHTED | operators.POOLING | operators.MAX_POOLING | operators.PRODUCTS
    tail: set[fx.Node] = set()
    for node in reversed(nodes):
        is_last = node.op == "output"
        shapes = node.op == "call_function" and operators.name_of(node) not in computes
        if is_last or (shapes and node.users and tail.issuperset(node.users)):
            tail.add(node)
    return tail


def _entered(node: fx.Node) -> list[fx.Node | None]:
    """What uses the node's output, perhaps reshaped: layers, and None for anything else."""
    found: list[fx.Node | None] = []
    for user in node.users:
        if operators.keeps_grid(user):
            found += _entered(user)
        elif operators.name_of(user) != "aten.sym_size.int":
            is_layer = operators.has_weight(user) and user.args[1] is not node
            found.append(user if is_layer else None)
    return found


def build_student(
    teacher: Captured,
    scheme: Scheme,
    *,
    quantizers: Quantizers = "min-max",
    fixed_statistics: bool = True,
) -> Student:
    """A trainable copy of the teacher with the scheme's quantizers; ranges are not yet known.

    quantizers: "min-max" follow the weights and the batches; "learned" and "rounded" train with
        the student, whose batch norms are then folded into its layers beforehand: weights as
        `LearnedWeight` or `RoundedWeight`.
    With fixed_statistics False the batch norms' running statistics follow in training mode.

    Raises UsageError when the scheme finds no weight or no activation to quantize.
    """
    if quantizers != "min-max":
        teacher = fold_batch_norms(teacher)
    widths = activation_widths(teacher, scheme)
    weights = scheme.weight_bits(list(filter(operators.has_weight, teacher.network.graph.nodes)))
    _check_quantizable(teacher, scheme, weights, widths)
    graph = fx.Graph()
    teacher_tensors = tensors_of(teacher.network)
    attributes: dict[str, Tensor | nn.Module] = _trainable(teacher_tensors)
    learned: dict[int, WeightQuantizer] = {}
    new: dict[fx.Node, fx.Node] = {}
    norms: dict[tuple[str, ...], StudentBatchNorm] = {}

    def call(kind: str, name: str, module: nn.Module, argument: fx.Node) -> fx.Node:
        target = f"{kind}.{name.replace('.', '_')}"
        attributes[target] = module
        return graph.call_module(target, (argument,))

    def weight_quantizer(node: fx.Node) -> WeightQuantizer:
        layout, bits = operators.weight_layout(node), weights[node]
        if quantizers == "min-max":
            return MinMaxWeight(bits, *layout)
        weight = teacher_tensors[str(node.args[1].target)]  # type: ignore[union-attr]
        if id(weight) not in learned:  # a weight that is used twice is one
            kind = LearnedWeight if quantizers == "learned" else RoundedWeight
            learned[id(weight)] = kind(weight, bits, *layout)
        return learned[id(weight)]

    batch_norms = set(teacher.batch_norms)
    unquantized: dict[fx.Node, fx.Node] = {}
    for node in teacher.network.graph.nodes:
        if node.op == "output":  # a feature map that is returned is returned as it was
            new[node] = graph.node_copy(node, lambda source: unquantized.get(source, new[source]))
        elif node in batch_norms:
            key = tuple(str(argument) for argument in node.args[1:])
            if key not in norms:  # a batch norm that is used twice is one
                norms[key] = StudentBatchNorm(batch_norm_of(teacher, node), fixed_statistics)
            new[node] = call(BATCH_NORM, node.name, norms[key], new[node.args[0]])
        else:
            new[node] = graph.node_copy(node, new.__getitem__)
            if node in weights:
                quantizer = weight_quantizer(node)
                with graph.inserting_before(new[node]):
                    weight = call(WEIGHT, node.name, quantizer, new[node.args[1]])
                new[node].update_arg(1, weight)
        if node in widths:
            activation = ACTIVATION_QUANTIZERS[quantizers](widths[node])
            unquantized[node] = new[node]
            new[node] = call(ACTIVATION, node.name, activation, new[node])
    graph.eliminate_dead_code(lambda node: node.op in {"placeholder", "output"})
    used = {str(node.target) for node in graph.nodes if node.op in {"get_attr", "call_module"}}
    chosen = {name: value for name, value in attributes.items() if name in used}
    return Student(fx.GraphModule(chosen, graph)).to(teacher.device)


def _check_quantizable(
    teacher: Captured, scheme: Scheme, weights: dict[fx.Node, int], widths: dict[fx.Node, int]
) -> None:
    if not weights:
        raise UsageError(
            "there must be a convolution or linear layer to quantize; this network has none"
            f"{' but those that are kept float' if scheme.keep else ''}."
        )
    if not widths:
        raise UsageError(
            f"placement {scheme.placement!r} quantizes the outputs of ReLUs, of which this network "
            "has none to quantize: its activations would stay float. Use placement 'full'."
        )
    for node in filter(operators.has_weight, teacher.network.graph.nodes):
        bias = node.args[2] if len(node.args) > 2 else None
        if isinstance(bias, fx.Node) and bias.op != "get_attr":
            raise UsageError(
                f"a layer's bias must be a tensor of the network; that of {node.name} is computed "
                "from the input. Add it after the layer instead."
            )


def _trainable(tensors: dict[str, Tensor]) -> dict[str, Tensor | nn.Module]:
    """Copies of the teacher's tensors; its parameters train, and shared ones stay shared."""
    copies = {
        id(tensor): nn.Parameter(tensor.detach().clone())
        if isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
        else tensor.clone()
        for tensor in tensors.values()
    }
    return {name: copies[id(tensor)] for name, tensor in tensors.items()}


def _after_batch_norm(node: fx.Node) -> fx.Node:
    """The batch norm that alone follows the node and will be folded into it, or the node."""
    (user,) = node.users if len(node.users) == 1 else (node,)
    folds = operators.name_of(user) == operators.BATCH_NORM and operators.has_channels_second(node)
    return user if folds else node


def _feeds_rectifier_only(node: fx.Node) -> bool:
    """Whether ReLUs alone use the node's output, perhaps reshaped."""
    return all(
        operators.is_rectifier(user)
        or (operators.keeps_grid(user) and bool(user.users) and _feeds_rectifier_only(user))
        for user in _after_batch_norm(node).users
    )


def feeds_softmax_only(node: fx.Node) -> bool:
    """Whether a node scales, masks or moves attention scores, on the way to their softmax alone.

    Between a matrix product and a softmax a runtime computes in float.
    """
    if operators.name_of(node) not in operators.AFFINE and not operators.keeps_grid(node):
        return False
    if sum(map(operators.is_activation, node.all_input_nodes)) > 1:
        return False
    return bool(node.users) and all(
        operators.name_of(user) in operators.SOFTMAX or feeds_softmax_only(user)
        for user in node.users
    )


def _carries_on(node: fx.Node) -> bool:
    """Whether a node is on a residual path: a sum, or parts joined, that enters sums alone.

    No layer or product reads it; a norm may.
    """
    if operators.name_of(node) not in operators.SUMS | operators.JOINS:
        return False
    users = list(node.users)
    for user in users:
        if operators.keeps_grid(user):
            users += user.users
    names = {operators.name_of(user) for user in users}
    return bool(names & operators.SUMS) and not names & (operators.WEIGHTED | operators.PRODUCTS)


def _input_signals(nodes: list[fx.Node]) -> set[fx.Node]:
    """The network's input, and what scaling and shifting by constants makes of it."""
    signals = {node for node in nodes if node.op == "placeholder"}
    for node in nodes:
        sources = [
            operators.grid_source(source)
            for source in node.all_input_nodes
            if operators.is_activation(source)
        ]
        if operators.name_of(node) in operators.AFFINE and len(sources) == 1:
            signals |= {node} if sources[0] in signals else set()
    return signals
