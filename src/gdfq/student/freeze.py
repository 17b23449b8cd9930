"""Freezing: the tuned student becomes integer codes, scales and zero points."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from gdfq.errors import GdfqError
from gdfq.functional.grid import (
    Layout,
    code_bounds,
    dequantize,
    quantize_bias,
    room_for_bias,
)
from gdfq.graph import operators, queries
from gdfq.graph.batch_norms import batch_norm_after
from gdfq.graph.tensors import flat_module, tensors_of
from gdfq.quantizers.base import ActivationQuantizer, QuantizedTensor, WeightQuantizer
from gdfq.quantizers.tokens import TokenRounding
from gdfq.student.build import ACTIVATION, Student, StudentBatchNorm
from gdfq.student.integer_network import IntegerNetwork, activation_grid, coarser, scale_of
from gdfq.student.ties import clamped, possible_results, scale_off_ties


@torch.no_grad()
def freeze(student: Student) -> IntegerNetwork:
    """Return the integer network of a student: codes, scales and zero points, batch norms folded.

    A batch norm y = s x + t that is the only user of a convolution or linear layer becomes part of
    it: s multiplies the channel's scale (a negative s mirrors its codes), t is added to the bias.
    The result consists of tensors and operators in `operators.ALLOWED`, so that it can be stored
    as data.

    Raises:
        GdfqError: An activation quantizer was never calibrated.
    """
    return IntegerNetwork(_Freezer(student).run())


_PARTS = frozenset({"codes", "scale", "zero_point", "bias", "weight", "mean", "variance"})
"""Names of the constants of a layer, an activation or a batch norm."""


class _Freezer:
    """Writes the graph of the integer network from the student's graph."""

    def __init__(self, student: Student) -> None:
        self.source = student.network
        # A quantizer or batch norm that is used twice is found under both its names.
        self.modules: dict[str, torch.nn.Module] = dict(
            student.network.named_modules(remove_duplicate=False)
        )
        self.source_tensors = tensors_of(student.network)
        # New constants have a namespace apart from the network's own tensors.
        self.ours = "quantized"
        while any(name.split(".")[0] == self.ours for name in self.source_tensors):
            self.ours += "_"
        self.graph = fx.Graph()
        self.tensors: dict[str, Tensor] = {}
        self.new: dict[fx.Node, fx.Node] = {}

    def run(self) -> fx.GraphModule:
        for node in self.source.graph.nodes:
            module = self._module(node)
            if node.op == "get_attr" or isinstance(module, WeightQuantizer):
                continue  # written where they are used
            if isinstance(module, ActivationQuantizer):
                self.new[node] = self._activation(node, module)
            elif isinstance(module, TokenRounding):
                (x,) = node.all_input_nodes
                rounding = operators.resolve(operators.FAKE_QUANTIZE_TOKENS)
                self.new[node] = self.graph.call_function(rounding, (self.new[x], module.bits))
            elif isinstance(module, StudentBatchNorm):
                (x,) = node.all_input_nodes
                folded = self._norm_after(x) is module
                self.new[node] = self.new[x] if folded else self._norm(node, module)
            elif self._weight_quantizer(node) is not None:
                self.new[node] = self._layer(node)
            else:
                self.new[node] = self.graph.node_copy(node, self._mapped)
        self.graph.eliminate_dead_code()
        return flat_module(self.graph, self.tensors)

    def _mapped(self, node: fx.Node) -> fx.Node:
        """Return the frozen graph's node for a node of the student."""
        if node not in self.new and node.op == "get_attr":
            name = str(node.target)
            self.tensors[name] = self.source_tensors[name].detach()
            self.new[node] = self.graph.get_attr(name)
        return self.new[node]

    def _constant(self, name: str, value: Tensor) -> fx.Node:
        assert name not in self.tensors
        self.tensors[name] = value.detach()
        return self.graph.get_attr(name)

    def _base(self, name: str) -> str:
        """Return an unused name for constants: layers may be shared, or named like operators.

        No constant may have the name of a module that holds others: a layer `conv` has a constant
        `conv.scale`, and may have a submodule of that name.
        """
        base = f"{self.ours}.{name}"
        while any(
            taken.rpartition(".")[0] == base
            or f"{base}.".startswith(f"{taken}.")
            or (taken.startswith(f"{base}.") and taken[len(base) + 1 :].split(".")[0] in _PARTS)
            for taken in self.tensors
        ):
            base += "_"
        return base

    def _module(self, node: object) -> torch.nn.Module | None:
        if not isinstance(node, fx.Node) or node.op != "call_module":
            return None
        return self.modules[str(node.target)]

    def _weight_quantizer(self, node: fx.Node) -> WeightQuantizer | None:
        module = self._module(node.args[1]) if len(node.args) > 1 else None
        return module if isinstance(module, WeightQuantizer) else None

    def _norm_after(self, node: fx.Node) -> StudentBatchNorm | None:
        """Return the batch norm that folds into a layer, its only user, or None."""
        if self._weight_quantizer(node) is None:
            return None
        norm = batch_norm_after(node, lambda n: isinstance(self._module(n), StudentBatchNorm))
        module = self._module(norm)
        return module if isinstance(module, StudentBatchNorm) else None

    def _activation(self, node: fx.Node, module: ActivationQuantizer) -> fx.Node:
        if not module.batches:
            raise GdfqError(
                f"every activation range must be known; that of {node.target} is not. "
                "Calibrate the student first."
            )
        base = self._base(str(node.target).removeprefix(f"{ACTIVATION}."))
        (x,) = node.all_input_nodes
        scale, zero_point = module.grid()
        if module.form is not None:
            return self.graph.call_function(
                operators.resolve(operators.FAKE_QUANTIZE_FLOAT),
                (self.new[x], self._constant(f"{base}.scale", scale), module.form.name),
            )
        # Activations with one grid keep one scale.
        results = possible_results(clamped(self.new[x]), self._values_of)
        if results is not None and module.places == 1:
            scale = scale_off_ties(results, scale, zero_point, module.bits)
        constants = [
            self._constant(f"{base}.{part}", value)
            for part, value in (("scale", scale), ("zero_point", zero_point))
        ]
        arguments: Any = (self.new[x], *constants, module.bits)
        return self.graph.call_function(operators.resolve(operators.FAKE_QUANTIZE), arguments)

    def _values_of(self, node: fx.Node) -> Tensor | None:
        """Return all values of a constant or of a tensor on a grid, else None."""
        if node.op == "get_attr":
            values: Tensor = self.tensors[str(node.target)].unique()
            return values
        found = activation_grid(node, self.tensors)
        if found is None or found.form is not None:
            return None
        low, high = code_bounds(found.bits)
        codes = torch.arange(low, high + 1, device=found.scale.device)
        return dequantize(codes, found.scale, found.zero_point, found.bits)

    def _norm(self, node: fx.Node, module: StudentBatchNorm) -> fx.Node:
        norm = module.current()
        parts = {n: getattr(norm, n) for n in ("weight", "bias", "mean", "variance")}
        base = self._base(node.name)
        constants = [self._constant(f"{base}.{n}", value) for n, value in parts.items()]
        (x,) = node.all_input_nodes
        arguments: Any = (self.new[x], *constants, False, 0.0, norm.eps, False)
        return self.graph.call_function(operators.resolve(operators.BATCH_NORM), arguments)

    def _layer(self, node: fx.Node) -> fx.Node:
        """Write a convolution or linear layer, with the batch norm after it folded in."""
        arguments: tuple[Any, ...] = node.args if len(node.args) > 2 else (*node.args, None)
        x, weight_node, bias_node, *rest = arguments
        quantizer = self._weight_quantizer(node)
        assert quantizer is not None
        name = str(weight_node.args[0].target)
        weight = quantizer.quantized(self.source_tensors[name])
        bias = None if bias_node is None else self.source_tensors[str(bias_node.target)]
        norm = self._norm_after(node)
        if norm is not None:
            scale, shift = norm.current().scale_and_shift()
            weight = rescaled(weight, quantizer.along_channels(scale, weight.codes))
            bias = shift if bias is None else shift + scale * bias
        x = self._mapped(x)
        input_scale = self._input_scale(x, quantizer) if weight.form is None else None
        if input_scale is not None and bias is not None:
            room = room_for_bias(bias, self.tensors[str(input_scale.target)], weight.scale)
            weight = coarser(weight, room.to(weight.scale.dtype))
        base = self._base(name.removesuffix(".folded_weight").removesuffix(".weight"))
        names = ("codes", "scale", *(("zero_point",) if weight.form is None else ()))
        constants = [self._constant(f"{base}.{n}", getattr(weight, n)) for n in names]
        kind = operators.DEQUANTIZE if weight.form is None else operators.DEQUANTIZE_FLOAT
        last = weight.bits if weight.form is None else weight.form.name
        dequantized = self.graph.call_function(operators.resolve(kind), (*constants, last))
        new_bias = None
        if bias is not None and input_scale is not None:
            codes = quantize_bias(bias, self.tensors[str(input_scale.target)], weight.scale)
            arguments = (self._constant(f"{base}.bias", codes), input_scale, constants[1])
            new_bias = self.graph.call_function(
                operators.resolve(operators.DEQUANTIZE_BIAS), arguments
            )
        elif bias is not None:
            new_bias = self._constant(f"{base}.bias", bias)
        rest, keywords = fx.node.map_arg((rest, node.kwargs), self._mapped)
        function: Any = node.target
        return self.graph.call_function(function, (x, dequantized, new_bias, *rest), keywords)

    def _input_scale(self, x: fx.Node, quantizer: WeightQuantizer) -> fx.Node | None:
        """Return the scale of a layer's input if an integer runtime can add the bias.

        Grouped transposed convolutions have no scales by channel, and keep their bias as it is.
        """
        source = queries.grid_source(x)
        on_grid = operators.name_of(source) == operators.FAKE_QUANTIZE
        if not on_grid or (quantizer.layout is not Layout.ROWS and quantizer.groups > 1):
            return None
        return scale_of(source)


def rescaled(tensor: QuantizedTensor, factor: Tensor) -> QuantizedTensor:
    """Return the quantized tensor times `factor`, which broadcasts as its scale; codes are exact.

    −(q − z) = (p−q) − (p−z): a negative factor mirrors the codes. With p = −1 they stay within
    their bounds. Where z is 0 and no code is the lowest, p = 0 keeps z, too. Codes of a
    floating-point grid change their sign bit.
    """
    if tensor.form is not None:
        flipped = torch.where(factor < 0, tensor.codes ^ tensor.form.sign_bit, tensor.codes)
        return replace(
            tensor,
            codes=flipped.masked_fill(factor == 0, 0),
            scale=torch.where(factor == 0, 1.0, tensor.scale * factor.abs()),
        )
    negative, zero = factor < 0, factor == 0
    alike = [dim for dim, size in enumerate(tensor.zero_point.shape) if size == 1]
    lowest = tensor.codes.amin(alike, keepdim=True)
    keeps = (tensor.zero_point == 0) & (lowest > code_bounds(tensor.bits)[0])
    pivot = keeps.to(tensor.codes.dtype) - 1
    codes = torch.where(negative, pivot - tensor.codes, tensor.codes)
    zero_point = torch.where(negative, pivot - tensor.zero_point, tensor.zero_point)
    return QuantizedTensor(
        codes.masked_fill(zero, 0),
        torch.where(zero, 1.0, tensor.scale * factor.abs()),
        zero_point.masked_fill(zero, 0),
        tensor.bits,
    )
