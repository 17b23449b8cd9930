"""The student: a trainable copy of the teacher's graph with fake quantizers."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn

from gdfq.functional.grid import code_bounds
from gdfq.graph import operators, queries
from gdfq.graph.batch_norms import BatchNorm, batch_norm_of, is_batch_norm
from gdfq.graph.blocks import WithFeatures, with_features
from gdfq.graph.capture import Captured
from gdfq.graph.rewrite import Copy, rewrite
from gdfq.graph.tensors import tensors_of
from gdfq.quantizers.base import ActivationQuantizer, WeightQuantizer
from gdfq.quantizers.family import MINMAX, QuantizerFamily
from gdfq.quantizers.recompute import recomputing
from gdfq.student.assignment import AssignedQuantizers, BitsByNode, check_quantizable
from gdfq.student.placement import rounded_input
from gdfq.student.scheme import Scheme

ACTIVATION, WEIGHT, BATCH_NORM = "fake_activation", "fake_weight", "student_batch_norm"
"""Where the student keeps its quantizers and batch norms."""
_LAYER_INPUT = "_into_layers"
"""End of the names of quantizers that round what is carried again, for layers."""


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
        """Return its present values, detached."""
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

    def forward(self, *inputs: Tensor) -> Any:
        with recomputing():
            return self.network(*inputs)

    def named(self, names: Sequence[str]) -> list[fx.Node]:
        """Return the student's nodes for the teacher's nodes of these names."""
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
        """Return the student that also returns its quantized values for the teacher's nodes.

        It is for tuning, when the ranges are known: a ReLU before a grid that clamps in the same
        way is removed, which saves memory traffic and changes no value.
        """
        network = with_features(self.network, self.named(names))
        _leave_out_rectifiers_(network)

        def predict(*inputs: Tensor) -> tuple[Any, Sequence[Tensor]]:
            with recomputing():
                found: tuple[Any, Sequence[Tensor]] = network(*inputs)
                return found

        return predict

    @property
    def activations(self) -> Iterator[ActivationQuantizer]:
        """Return all activation quantizers."""
        return (module for module in self.modules() if isinstance(module, ActivationQuantizer))

    def ranges(self) -> dict[str, float]:
        """Return the extent of each activation's grid, by the name of its node."""
        return {
            name.rpartition(".")[2]: module.extent()
            for name, module in self.named_modules()
            if isinstance(module, ActivationQuantizer)
        }


def _leave_out_rectifiers_(network: fx.GraphModule) -> None:
    """Remove each ReLU before a grid that starts at 0 and passes no gradient below it."""
    for node in network.graph.nodes:
        quantizer = network.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not isinstance(quantizer, ActivationQuantizer) or not quantizer.clips_gradient:
            continue
        (source,) = node.all_input_nodes
        starts_at_zero = float(quantizer.grid()[1]) == code_bounds(quantizer.bits)[0]
        if (
            operators.name_of(source) == operators.RELU
            and list(source.users) == [node]
            and starts_at_zero
        ):
            node.replace_input_with(source, source.all_input_nodes[0])
            network.graph.erase_node(source)
    network.recompile()


def build_student(
    teacher: Captured,
    scheme: Scheme,
    *,
    quantizers: QuantizerFamily = MINMAX,
    fixed_statistics: bool = True,
) -> Student:
    """Return a trainable copy of the teacher with quantizers whose ranges are not yet known.

    Args:
        teacher: The trained network.
        scheme: What is quantized, and to how many bits.
        quantizers: The family of its quantizers; some fold the batch norms into the layers first.
        fixed_statistics: Whether the running statistics of batch norms that are not folded stay as
            they are; otherwise they follow the batches in training mode.

    Raises:
        UsageError: The scheme finds no weight or no activation to quantize.
    """
    teacher = quantizers.prepared(teacher)
    bits = BitsByNode.of(teacher, scheme)
    check_quantizable(teacher, scheme, bits)
    assigned = AssignedQuantizers(teacher, scheme, quantizers, bits)
    builder = _Builder(teacher, bits, assigned, fixed_statistics=fixed_statistics)
    graph = rewrite(teacher.network.graph, builder.change)
    graph.eliminate_dead_code(lambda node: node.op in {"placeholder", "output"})
    fixed = set() if scheme.new_biases else _zero_biases(teacher)
    attributes = {**_trainable(tensors_of(teacher.network), fixed), **builder.modules}
    used = {str(node.target) for node in graph.nodes if node.op in {"get_attr", "call_module"}}
    chosen = {name: value for name, value in attributes.items() if name in used}
    network = fx.GraphModule(chosen, graph)
    _count_places_(network)
    _set_unread_weights_apart_(network)
    return Student(network).to(teacher.device)


class _Builder:
    """Writes the nodes of a student.

    Attributes:
        modules: Its quantizers and batch norms, by their places.
    """

    def __init__(
        self,
        teacher: Captured,
        bits: BitsByNode,
        quantizers: AssignedQuantizers,
        *,
        fixed_statistics: bool,
    ) -> None:
        self._teacher, self._bits, self._quantizers = teacher, bits, quantizers
        self._fixed_statistics = fixed_statistics
        self.modules: dict[str, nn.Module] = {}
        self._norms: dict[tuple[str, ...], StudentBatchNorm] = {}
        self._unquantized: dict[fx.Node, fx.Node] = {}
        self._narrowed: dict[fx.Node, fx.Node] = {}

    def change(self, copy: Copy, node: fx.Node) -> fx.Node:
        """Write a node of the teacher with its quantizers, and return what stands for it."""
        if node.op == "output":
            return self._output(copy, node)
        if is_batch_norm(node):
            new = self._batch_norm(copy, node)
        else:
            new = self._layer(copy, node) if node in self._bits.weights else copy.of(node)
        if node not in self._bits.activations:
            return new
        self._unquantized[node] = new
        return self._call(copy, ACTIVATION, node.name, self._quantizers.of_activation(node), new)

    def _output(self, copy: Copy, node: fx.Node) -> fx.Node:
        """Return the outputs unquantized."""
        unquantized = self._unquantized
        returned = fx.node.map_arg(
            node.args[0], lambda source: unquantized.get(source, copy[source])
        )
        return copy.output(returned)

    def _batch_norm(self, copy: Copy, node: fx.Node) -> fx.Node:
        key = tuple(str(argument) for argument in node.args[1:])
        if key not in self._norms:  # a batch norm that is used twice is one
            norm = batch_norm_of(self._teacher, node)
            self._norms[key] = StudentBatchNorm(norm, self._fixed_statistics)
        return self._call(
            copy, BATCH_NORM, node.name, self._norms[key], copy[queries.input_of(node)]
        )

    def _layer(self, copy: Copy, node: fx.Node) -> fx.Node:
        x = self._layer_input(copy, node)
        new = copy.of(node)
        quantizer = self._quantizers.of_weight(node)
        new.update_arg(0, x)
        with copy.graph.inserting_before(new):
            weight = copy[queries.weight_of(node)]
            new.update_arg(1, self._call(copy, WEIGHT, node.name, quantizer, weight))
        return new

    def _layer_input(self, copy: Copy, layer: fx.Node) -> fx.Node:
        """Return a layer's input, rounded again where it is carried with more bits."""
        source = rounded_input(layer, self._bits.layer_inputs)
        x = queries.input_of(layer)
        if source is None:
            return copy[x]
        if x not in self._narrowed:
            quantizer = self._quantizers.of_layer_input(source)
            name = f"{x.name}{_LAYER_INPUT}"
            self._narrowed[x] = self._call(copy, ACTIVATION, name, quantizer, copy[x])
        return self._narrowed[x]

    def _call(
        self, copy: Copy, kind: str, name: str, module: nn.Module, argument: fx.Node
    ) -> fx.Node:
        """Write a call of a module, which gets a place of its own."""
        target = f"{kind}.{name.replace('.', '_')}"
        self.modules[target] = module
        return copy.graph.call_module(target, (argument,))


def _count_places_(network: fx.GraphModule) -> None:
    """Tell activation quantizers how many activations they round, as those of a group share one."""
    calls = network.graph.find_nodes(op="call_module")
    modules = [network.get_submodule(str(call.target)) for call in calls]
    for module in modules:
        if isinstance(module, ActivationQuantizer):
            module.places = sum(other is module for other in modules)


def _set_unread_weights_apart_(network: fx.GraphModule) -> None:
    """Keep weights that no call reads out of the parameters and of the state: they do not change.

    Args:
        network: The network of a student, changed in place.
    """
    modules = dict(network.named_modules())
    unread: dict[str, bool] = {}
    for node in network.graph.find_nodes(op="get_attr"):
        quantizers = [modules.get(str(user.target)) for user in node.users]
        alone = all(isinstance(q, WeightQuantizer) and not q.reads_weight for q in quantizers)
        unread[str(node.target)] = alone and unread.get(str(node.target), True)
    for name in (name for name, alone in unread.items() if alone):
        owner, _, attribute = name.rpartition(".")
        module = modules.get(owner)
        # A layer inside a layer may have its weight below the name of the outer one's.
        if module is None or any(other.startswith(f"{name}.") for other in unread):
            continue
        weight = getattr(module, attribute).detach()
        delattr(module, attribute)
        module.register_buffer(attribute, weight, persistent=False)


def _zero_biases(teacher: Captured) -> set[str]:
    """Return the names of biases that are 0, as those that layers without one are given."""
    tensors = tensors_of(teacher.network)
    biases = map(queries.bias_of, queries.weighted_layers(teacher.network))
    names = {str(bias.target) for bias in biases if bias is not None}
    return {name for name in names if not bool(tensors[name].any())}


def _trainable(
    tensors: Mapping[str, Tensor], fixed: Collection[str]
) -> dict[str, Tensor | nn.Module]:
    """Return copies of the teacher's tensors; shared ones stay shared.

    Parameters train, apart from those with the names in `fixed`.
    """
    copies = {
        id(tensor): nn.Parameter(tensor.detach().clone())
        if isinstance(tensor, nn.Parameter) and tensor.is_floating_point() and name not in fixed
        else tensor.detach().clone()
        for name, tensor in tensors.items()
    }
    return {name: copies[id(tensor)] for name, tensor in tensors.items()}
