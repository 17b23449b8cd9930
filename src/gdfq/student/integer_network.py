"""The integer network (the frozen student): codes, scales, zero points, and questions about them.

Its graph calls three operators for what is quantized (`gdfq.functional.grid`): `dequantize` makes a
layer's weight of its codes, `dequantize_bias` the bias, and `fake_quantize` rounds an activation;
`fake_quantize_tokens` does so with a scale for each token, which is not stored. Two more do that on
floating-point grids (`gdfq.functional.float_grid`). This module alone knows
where their arguments stand.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from gdfq.errors import UsageError
from gdfq.execution.precision import in_full_float32
from gdfq.functional.float_grid import FORMATS, NumberFormat, fake_quantize_float
from gdfq.functional.grid import (
    MAX_BITS,
    MIN_BITS,
    along_blocks,
    code_bounds,
    dequantize_bias,
    fake_quantize,
    quantize_bias,
)
from gdfq.graph import operators, queries
from gdfq.graph.constants import constants_of
from gdfq.graph.outputs import in_order
from gdfq.graph.rewrite import Copy, rewrite
from gdfq.graph.tensors import flat_module, tensors_of
from gdfq.quantizers.base import QuantizedTensor
from gdfq.student.integer_form import integer_form


@dataclass(frozen=True, eq=False)
class ActivationGrid:
    """The quantizer of one activation."""

    node: fx.Node
    name: str
    """Unique name of the activation, such as `layer1.relu`."""
    scale: Tensor
    zero_point: Tensor
    bits: int
    form: NumberFormat | None = None
    """The format of a floating-point grid, whose zero point is 0; None for an integer grid."""

    def rounded(self, x: Tensor) -> Tensor:
        """Return x rounded to the grid."""
        if self.form is not None:
            return fake_quantize_float(x, self.scale, self.form.name)
        return fake_quantize(x, self.scale, self.zero_point, self.bits)

    @property
    def ends(self) -> tuple[float, float]:
        """Return the lowest and the highest value of the grid."""
        if self.form is not None:
            return self.form.lowest * float(self.scale), self.form.largest * float(self.scale)
        low, high = (
            float((code - self.zero_point) * self.scale) for code in code_bounds(self.bits)
        )
        return low, high


@dataclass(frozen=True, eq=False)
class TokenGrids:
    """The rounding of an activation with a scale for each token, which is found where it runs."""

    node: fx.Node
    name: str
    """Unique name of the activation: that of the first layer that it enters, and `tokens`."""
    bits: int


@dataclass(frozen=True, eq=False)
class IntegerWeight:
    """A layer's weight: codes in its shape, scale and zero point that broadcast to it."""

    node: fx.Node
    codes_name: str
    scale_name: str
    zero_point_name: str
    """Empty for a floating-point grid."""
    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    bits: int
    form: NumberFormat | None = None
    """The format of a floating-point grid; None for an integer grid."""

    @property
    def name(self) -> str:
        """Unique name of the weight's layer, such as `layer1.conv1`."""
        return stem(self.codes_name)

    @property
    def reach(self) -> float:
        """The largest |q − z|."""
        return float((self.codes.float() - along_blocks(self.zero_point, self.codes)).abs().max())

    @property
    def quantized(self) -> QuantizedTensor:
        return QuantizedTensor(self.codes, self.scale, self.zero_point, self.bits, self.form)


@dataclass(frozen=True, eq=False)
class IntegerLayer:
    """A convolution or linear layer of the frozen student."""

    node: fx.Node
    weight: IntegerWeight | None
    """None for a layer that stays float."""
    bias: Tensor | None
    """Codes int32 where the layer's input is quantized, else floats; None without a bias."""
    input: ActivationGrid | None
    """The quantizer of the layer's input; None if the input stays float."""

    @property
    def bits(self) -> int | None:
        """Bits of the weight; None for a layer that stays float."""
        return None if self.weight is None else self.weight.bits

    @property
    def token_bits(self) -> int | None:
        """Bits of the layer's input, where each token has a scale of its own; None elsewhere."""
        x = queries.input_of(self.node)
        if operators.name_of(x) != operators.FAKE_QUANTIZE_TOKENS:
            return None
        return int(str(x.args[1]))


class IntegerNetwork(nn.Module):
    """The frozen student; a call computes its function as integer runtimes do.

    Attributes:
        module: The graph, of tensors and of operators in `operators.ALLOWED` alone. It takes one
            tensor for each input of the network and returns its outputs in order: one tensor, or a
            tuple of them.
    """

    module: fx.GraphModule

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__()
        self.module = module
        self._form: tuple[fx.GraphModule, dict[str, tuple[Tensor, int]]] | None = None

    def forward(self, *inputs: Tensor) -> Any:
        device = inputs[0].device
        # Autocast would round whole numbers, and TF32 the layers that stay float.
        with torch.autocast(device.type, enabled=False), in_full_float32(device):
            return self.integer_form(*inputs)

    @property
    def integer_form(self) -> fx.GraphModule:
        """The graph that is computed: it adds whole numbers (`gdfq.student.integer_form`).

        It shares the tensors of `module`, and is written again when these are replaced, as by a
        move to another device, or changed, as by `load_state_dict`.
        """
        tensors = self.tensors
        written = {} if self._form is None else self._form[1]
        if self._form is None or any(_is_changed(t, *written[n]) for n, t in tensors.items()):
            graph = integer_form(self.graph, tensors)
            used = {str(node.target) for node in graph.find_nodes(op="get_attr")}
            form = fx.GraphModule({name: tensors[name] for name in used}, graph)
            self._form = form, {name: (t, _version(t)) for name, t in tensors.items()}
        return self._form[0]

    def __deepcopy__(self, memo: dict[int, Any]) -> "IntegerNetwork":
        return IntegerNetwork(deepcopy(self.module, memo)).train(self.training)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UsageError(
            "an integer network is saved as data, not pickled: a pickle of its graph would lose "
            "which tensors are codes. Use QuantizedNetwork.save and gdfq.load."
        )

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors, by the names that the graph uses."""
        return tensors_of(self.module)

    def outputs(self, *inputs: Tensor) -> list[Tensor]:
        """Return the outputs in order, given one tensor for each input."""
        return in_order(self(*inputs))

    @property
    def constants(self) -> dict[fx.Node, Any]:
        """Return the values of constants, without those that lie on the grid of an activation."""
        return {
            node: constant.value
            for node, constant in constants_of(self.module).items()
            if not constant.operators & operators.ROUNDING
        }

    @property
    def activations(self) -> list[ActivationGrid]:
        """Return the quantizers of activations, in order of execution."""
        tensors = self.tensors
        return [_grid(node, tensors) for node in self.graph.nodes if _is_quantizer(node)]

    @property
    def tokens(self) -> list[TokenGrids]:
        """Return the activations with a scale for each token, in order of execution."""
        entered: dict[fx.Node, str] = {}
        for layer in self.layers:
            if layer.weight is not None:
                entered.setdefault(queries.input_of(layer.node), layer.weight.name)
        found: dict[str, TokenGrids] = {}
        for node in self._calls(operators.FAKE_QUANTIZE_TOKENS):
            name = base = f"{entered.get(node, node.name)}.tokens"
            while name in found:  # a layer that is computed twice
                name = f"{base}_{len(found)}"
            found[name] = TokenGrids(node, name, int(str(node.args[1])))
        return list(found.values())

    @property
    def joins(self) -> list[list[ActivationGrid]]:
        """Return the grids of each concatenation: those of its inputs, then that of its result."""
        tensors = self.tensors
        found = []
        for node in self.graph.nodes:
            if operators.name_of(node) not in operators.JOINS:
                continue
            rounded = [user for user in node.users if _is_quantizer(user)]
            inputs = [activation_grid(source, tensors) for source in node.all_input_nodes]
            found.append([*filter(None, inputs), *(_grid(user, tensors) for user in rounded)])
        return found

    @property
    def input_range(self) -> tuple[float, float] | None:
        """Return the lowest and the highest value of the grid of the first input, if it has one."""
        first = queries.inputs(self.graph)[0]
        grids = [grid for grid in self.activations if queries.input_of(grid.node) is first]
        if len(grids) != 1 or len(first.users) != 1:
            return None
        return grids[0].ends

    @property
    def weights(self) -> list[IntegerWeight]:
        """Return the quantized weights, in order of execution."""
        tensors = self.tensors
        return [_weight(node, tensors) for node in self.graph.nodes if _makes_weight(node)]

    @property
    def layers(self) -> list[IntegerLayer]:
        """Return all convolutions and linear layers, in order of execution."""
        tensors = self.tensors
        return [_layer(node, tensors) for node in queries.layers_of(self.module)]

    def code_bits(self) -> dict[str, int]:
        """Return the bits of each weight, by the name of its tensor of codes."""
        return {weight.codes_name: weight.bits for weight in self.weights}

    @torch.no_grad()
    def with_bits(self, bits: Mapping[str, int]) -> "IntegerNetwork":
        """Return the same network with fewer bits for some weights.

        Args:
            bits: New bits by the names of tensors of codes on integer grids, at most the present
                bits.
        """
        tensors = self.tensors
        changed = dict(tensors)
        for weight in self.weights:
            if weight.codes_name not in bits:
                continue
            found = _with_fewer_bits(weight.quantized, bits[weight.codes_name])
            changed[weight.codes_name] = found.codes
            changed[weight.scale_name] = found.scale
            changed[weight.zero_point_name] = found.zero_point
        for node in self._calls(operators.DEQUANTIZE_BIAS):
            name, activation, weight_scale = _names(node)
            bias = dequantize_bias(tensors[name], tensors[activation], tensors[weight_scale])
            changed[name] = quantize_bias(bias, tensors[activation], changed[weight_scale])

        def change(copy: Copy, node: fx.Node) -> fx.Node | None:
            if operators.name_of(node) != operators.DEQUANTIZE or _names(node)[0] not in bits:
                return None
            new = copy.of(node)
            new.update_arg(_BITS, bits[_names(node)[0]])
            return new

        return IntegerNetwork(flat_module(rewrite(self.graph, change), changed))

    @torch.no_grad()
    def as_float(self) -> "IntegerNetwork":
        """Return the network without rounding, its quantized weights written as floats."""
        tensors = self.tensors

        def change(copy: Copy, node: fx.Node) -> fx.Node | None:
            name = operators.name_of(node)
            if name in operators.ALL_ROUNDING:
                return copy[node.all_input_nodes[0]]
            if name not in operators.QUANTIZATION:
                return None
            args, _ = fx.node.map_arg((node.args, {}), lambda n: tensors[str(n.target)])
            constant = f"{_names(node)[0]}_float"
            value: Tensor = operators.resolve(name)(*args)
            tensors[constant] = nn.Parameter(value, requires_grad=False)
            return copy.graph.get_attr(constant)

        graph = rewrite(self.graph, change)
        graph.eliminate_dead_code(lambda node: node.op in {"placeholder", "output"})
        return IntegerNetwork(flat_module(graph, tensors))

    def _calls(self, name: str) -> list[fx.Node]:
        function = operators.resolve(name)
        return list(self.graph.find_nodes(op="call_function", target=function))


def _version(tensor: Tensor) -> int:
    """Return how often a tensor was changed in place; inference tensors do not count it."""
    return 0 if tensor.is_inference() else tensor._version


def _is_changed(tensor: Tensor, earlier: Tensor, version: int) -> bool:
    """Return whether a tensor is another one than earlier, or was changed since that version."""
    return tensor is not earlier or _version(tensor) != version


_BITS = 3
"""Index of the bits among the arguments of `fake_quantize` and `dequantize`."""
_STORED = {operators.FAKE_QUANTIZE: 2, operators.DEQUANTIZE: 3, operators.DEQUANTIZE_BIAS: 3}
"""Number of an operator's last tensor arguments that are constants of the network."""


def check_quantizer(node: fx.Node) -> None:
    """Check the form of a quantization operator.

    Raises:
        ValueError: Freezing does not write this form.
    """
    name = operators.name_of(node)
    if name not in operators.QUANTIZATION:
        return
    if name == operators.FAKE_QUANTIZE_TOKENS:
        x, *bits_alone = node.args
        known_bits = bits_alone in [[k] for k in range(MIN_BITS, MAX_BITS + 1)]
        if not isinstance(x, fx.Node) or node.kwargs or not known_bits:
            raise ValueError(f"{node.name!r} has arguments that no quantizer has")
        return
    if name in _FLOAT_STORED:
        _check_float_quantizer(node, _FLOAT_STORED[name])
        return
    has_bits = name != operators.DEQUANTIZE_BIAS
    tensors, bits = (node.args[:-1], node.args[-1]) if has_bits else (node.args, MAX_BITS)
    stored = [isinstance(t, fx.Node) and t.op == "get_attr" for t in tensors]
    known = isinstance(bits, int) and MIN_BITS <= bits <= MAX_BITS
    if len(stored) != 3 or node.kwargs or not known or not all(stored[-_STORED[name] :]):
        raise ValueError(f"{node.name!r} has arguments that no quantizer has")


_FLOAT_STORED = {operators.FAKE_QUANTIZE_FLOAT: 1, operators.DEQUANTIZE_FLOAT: 2}
"""Number of the last tensor arguments that are constants, of operators with formats."""


def _check_float_quantizer(node: fx.Node, stored: int) -> None:
    """Check the form of a quantization operator of floating-point grids; see `check_quantizer`."""
    *tensors, form = node.args
    constant = [isinstance(t, fx.Node) and t.op == "get_attr" for t in tensors]
    if len(constant) != 2 or node.kwargs or form not in FORMATS or not all(constant[-stored:]):
        raise ValueError(f"{node.name!r} has arguments that no quantizer has")


def activation_grid(node: fx.Node, tensors: Mapping[str, Tensor]) -> ActivationGrid | None:
    """Return the quantizer of the grid that a tensor lies on, or None for a float tensor."""
    source = queries.grid_source(node)
    return _grid(source, tensors) if _is_quantizer(source) else None


def _is_quantizer(node: fx.Node) -> bool:
    return operators.name_of(node) in operators.ROUNDING


def _makes_weight(node: fx.Node) -> bool:
    return operators.name_of(node) in operators.WEIGHT_CODES


def scale_of(node: fx.Node) -> fx.Node:
    """Return the constant that is the scale of an activation or a weight."""
    scale = node.args[1]
    assert isinstance(scale, fx.Node)
    return scale


def stem(constant: str) -> str:
    """Return `layer1.conv1` for the constant `quantized.layer1.conv1.codes`."""
    return constant.rpartition(".")[0].partition(".")[2]


def coarser(tensor: QuantizedTensor, factor: Tensor) -> QuantizedTensor:
    """Return a tensor requantized to `factor` >= 1 times its scale; 1 keeps its codes."""
    zero_point = (tensor.zero_point / factor).round()
    codes = ((tensor.codes - tensor.zero_point) / factor).round() + zero_point
    codes = codes.clamp(*code_bounds(tensor.bits)).to(tensor.codes.dtype)
    return QuantizedTensor(codes, tensor.scale * factor, zero_point, tensor.bits)


def _with_fewer_bits(tensor: QuantizedTensor, bits: int) -> QuantizedTensor:
    """Return a weight requantized to fewer bits, the sum of each channel's weights kept.

    Half of the codes of a bit more lie at ties. Rounded each by itself they shift the sum, and with
    it the mean of the channel's outputs, for inputs that are not negative. So the codes that cost
    least are rounded to their other neighbour, until the sum is that of before.
    """
    factor = 2.0 ** (tensor.bits - bits)
    zero_point = (tensor.zero_point / factor).round()
    low, high = code_bounds(bits)
    exact = (tensor.codes - tensor.zero_point) / factor + zero_point
    nearest = exact.round().clamp(low, high)
    missing = exact - nearest
    along = [d for d in range(exact.ndim) if tensor.scale.shape[d] == 1]
    direction = missing.sum(along, keepdim=True).sign()
    beside = nearest + direction
    gain = torch.where((beside >= low) & (beside <= high), missing * direction, 0)
    wanted = missing.sum(along, keepdim=True).abs().round()
    moved = (gain > 0) & (_ranks(-gain, along) < wanted)
    codes = torch.where(moved, beside, nearest).to(tensor.codes.dtype)
    return QuantizedTensor(codes, tensor.scale * factor, zero_point, bits)


def _ranks(values: Tensor, dims: list[int]) -> Tensor:
    """Return the place of each value, from 0 on, among those that differ in these dimensions."""
    last = [-1 - i for i in range(len(dims))]
    together = values.movedim(dims, last)
    flat = together.flatten(-len(dims))
    ranks = flat.argsort(dim=-1, stable=True).argsort(dim=-1)
    return ranks.view(together.shape).movedim(last, dims)


def _names(node: fx.Node) -> list[str]:
    """Return the names of the constants that a node reads."""
    return [str(argument.target) for argument in node.all_input_nodes if argument.op == "get_attr"]


def _form(node: fx.Node) -> NumberFormat:
    return FORMATS[str(node.args[-1])]


def _grid(node: fx.Node, tensors: Mapping[str, Tensor]) -> ActivationGrid:
    if operators.name_of(node) == operators.FAKE_QUANTIZE_FLOAT:
        (name,) = _names(node)
        form, value = _form(node), tensors[name]
        return ActivationGrid(node, stem(name), value, torch.zeros_like(value), form.bits, form)
    _, scale, zero_point, bits = node.args
    assert isinstance(scale, fx.Node)
    assert isinstance(zero_point, fx.Node)
    assert isinstance(bits, int)
    values = tensors[str(scale.target)], tensors[str(zero_point.target)]
    return ActivationGrid(node, stem(str(scale.target)), *values, bits)


def _weight(node: fx.Node, tensors: Mapping[str, Tensor]) -> IntegerWeight:
    if operators.name_of(node) == operators.DEQUANTIZE_FLOAT:
        codes, scale = _names(node)
        form, steps = _form(node), tensors[scale]
        zeros = torch.zeros_like(steps)
        return IntegerWeight(node, codes, scale, "", tensors[codes], steps, zeros, form.bits, form)
    bits = node.args[_BITS]
    assert isinstance(bits, int)
    codes, scale, zero_point = _names(node)
    values = tensors[codes], tensors[scale], tensors[zero_point]
    return IntegerWeight(node, codes, scale, zero_point, *values, bits)


def _layer(node: fx.Node, tensors: Mapping[str, Tensor]) -> IntegerLayer:
    weight_node, bias_node = queries.weight_of(node), queries.bias_of(node)
    is_quantized = _makes_weight(weight_node)
    if bias_node is not None and operators.name_of(bias_node) == operators.DEQUANTIZE_BIAS:
        bias_node = bias_node.all_input_nodes[0]
    return IntegerLayer(
        node,
        _weight(weight_node, tensors) if is_quantized else None,
        None if bias_node is None else tensors.get(str(bias_node.target)),
        activation_grid(queries.input_of(node), tensors),
    )
