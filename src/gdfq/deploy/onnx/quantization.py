"""The quantization operators of an exported graph, written as standard operators.

Weights of 4 bits and below are packed INT4 (INT2 at 2 bits), followed by a `Cast` to INT8 that a
runtime folds when it loads the file: small on disk, and kernels read 8-bit integers (other
forms: `deploy.onnx.form`). Activations are unsigned 8-bit codes; where values may lie beyond those
of their number of bits, an integer `Clip` follows (`StoredCodes`).
"""

from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from gdfq.deploy.onnx.form import Form
from gdfq.deploy.onnx.names import kind_of
from gdfq.deploy.onnx.passes import constant_values, inputs_of, remove_unused, replace_node
from gdfq.deploy.onnx.sizes import PACKED, STORED_FLOATS
from gdfq.deploy.onnx.tokens import Matrix, RoundedTokens, float_matrix, round_tokens
from gdfq.functional.float_grid import FORMATS, decode
from gdfq.functional.grid import code_bounds
from gdfq.student.integer_network import stem

_MAX_SAFE_CODE = 63
"""Largest magnitude of weight codes that cannot overflow the kernels of processors without VNNI."""


class QuantizationWriter:
    """Replaces the quantization operators of a graph by standard ones."""

    def __init__(self, graph: ir.Graph, form: Form, *, by_token: bool) -> None:
        self.graph = graph
        self.form = form
        self.by_token = by_token
        self.titles: dict[ir.Node, str] = {}
        """Names of the nodes that quantize activations."""
        self.tokens: dict[ir.Value, RoundedTokens] = {}
        """What has codes with a scale for each token."""
        self.matrices: dict[ir.Value, Matrix] = {}
        """Weights of language models."""
        self.zero: ir.Value | None = None
        """0 on a grid, once it is needed."""

    def write(self, node: ir.Node) -> None:
        form = {
            "FakeQuantize": self._activation,
            "FakeQuantizeTokens": self._tokens,
            "Dequantize": self._weight,
            "DequantizeBias": self._bias,
            "FakeQuantizeFloat": self._float_activation,
            "DequantizeFloat": self._float_weight,
        }[node.op_type]
        inputs = inputs_of(node)
        if node.op_type == "DequantizeBias" and self._has_float_bias(node):
            ir.convenience.replace_all_uses_with(node.outputs[0], self._float_bias(node))
            self.graph.remove(node, safe=True)
        else:
            replace_node(self.graph, node, form(node))
        remove_unused(self.graph, inputs[0])
        for value in inputs:  # of what was the operator's own
            if not value.uses() and value.name in self.graph.initializers:
                del self.graph.initializers[value.name]

    def _activation(self, node: ir.Node) -> list[ir.Node]:
        """Write codes as they are stored (`StoredCodes`), with the same shift of z."""
        x, scale, zero_point = inputs_of(node)
        bits, base = node.attributes["bits"].as_int(), node.attributes["title"].as_string()
        stored_lowest = node.attributes["lowest"].as_int()
        lowest, highest = code_bounds(bits)
        unsigned = (constant_values(zero_point) - lowest).astype(np.uint8)
        grid = constant_values(scale), unsigned, highest - lowest
        nodes: list[ir.Node] = []
        if not self.form.only_pairs:
            while (maker := x.producer()) is not None and _clips_less(maker, *grid):
                x = inputs_of(maker)[0]
        elif self.form.signed and (clamped := _rectified(x.producer(), *grid)) is not None:
            nodes.append(ir.node("Relu", [clamped]))
            x = nodes[-1].outputs[0]
        step = self._constant(f"{base}.scale", constant_values(scale))
        kind = np.int8 if self.form.signed else np.uint8
        shifted = (unsigned.astype(np.int16) + stored_lowest).astype(kind)
        new_zero_point = self._constant(f"{base}.zero_point", shifted)
        if node.attributes["adds_zero"].as_int():
            nodes.append(ir.node("Add", [x, self._zero()]))
            x = nodes[-1].outputs[0]
        nodes.append(ir.node("QuantizeLinear", [x, step, new_zero_point]))
        if node.attributes["needs_clip"].as_int():
            # Unsigned codes are never below 0.
            top = self._constant(f"codes.{highest - lowest}", np.array(highest - lowest, np.uint8))
            nodes.append(ir.node("Clip", [nodes[-1].outputs[0], None, top]))
        codes = nodes[-1].outputs[0]
        nodes.append(ir.node("DequantizeLinear", [codes, step, new_zero_point]))
        self.titles |= {made: f"{base}.{kind_of(made)}" for made in nodes}
        return nodes

    def _tokens(self, node: ir.Node) -> list[ir.Node]:
        """Write the rounding of tokens, and remember their codes for `multiply_codes`."""
        (x,) = inputs_of(node)
        title = node.attributes["title"].as_string()
        nodes, rounded = round_tokens(x, node.attributes["bits"].as_int(), self._constant)
        self.tokens[nodes[-1].outputs[0]] = rounded
        self.titles |= {made: title for made in nodes if made.outputs[0] is rounded.codes}
        return nodes

    def _zero(self) -> ir.Value:
        """Return 0 on a grid, as integer kernels need it."""
        if self.zero is None:
            code = self._constant("codes.zero", np.array(0, np.uint8))
            step = self._constant("codes.one", np.array(1, np.float32))
            # ONNX Runtime reshapes the code of 0, and would copy a shared zero point in each call.
            zero_point = self._constant("codes.zero_point", np.array(0, np.uint8))
            made = ir.node("DequantizeLinear", [code, step, zero_point])
            self.graph.insert_before(self.graph[0], [made])
            (self.zero,) = made.outputs
        return self.zero

    def _weight(self, node: ir.Node) -> list[ir.Node]:
        codes, scale, zero_point = inputs_of(node)
        bits = node.attributes["bits"].as_int()
        base = f"{stem(str(codes.name))}.weight"
        values, steps, offsets = (
            constant_values(codes),
            constant_values(scale),
            constant_values(zero_point),
        )
        nodes: list[ir.Node] = []
        if self.form.folds_weights:
            current = self._constant(base, (values - offsets).astype(np.int8))
            offsets = np.zeros_like(offsets)
        elif bits in PACKED:
            kind, numbers = PACKED[bits if self.form.has_int2 else max(bits, 3)]
            stored = self._constant(base, values.astype(numbers), kind)
            nodes.append(ir.node("Cast", [stored], {"to": ir.DataType.INT8}))
            current = nodes[-1].outputs[0]
        else:
            current = self._constant(base, values)
        if offsets.any():
            # A zero point in DequantizeLinear would cost the fast kernels; this folds.
            shape = offsets.shape if offsets.ndim else (1,) * values.ndim
            offset = self._constant(f"{base}_zero", offsets.astype(np.int8).reshape(shape))
            nodes.append(ir.node("Sub", [current, offset]))
            current = nodes[-1].outputs[0]
        if self.by_token:
            made, matrix = float_matrix(current, base, steps, values.shape[-1], self._constant)
            self.matrices[made[-1].outputs[0]] = matrix
            return [*nodes, *made]
        reach = int(np.abs(values - constant_values(zero_point)).max(initial=0))
        wide = reach > _MAX_SAFE_CODE or self.form.only_pairs
        # ONNX Runtime fuses a Gemm only with an explicit zero point, and where it
        # makes 8-bit weights unsigned (`runtimes.PRECISE`) it would add one of a wrong shape.
        zeros = wide or any(user.op_type == "Gemm" for user in node.outputs[0].consumers())
        return [*nodes, *self._scaled(current, base, steps, zeros=zeros)]

    def _scaled(
        self, codes: ir.Value, base: str, steps: np.ndarray[Any, Any], *, zeros: bool
    ) -> list[ir.Node]:
        """Write codes times the scales of a weight, with zero points that are 0 if needed."""
        axes = [axis for axis, size in enumerate(steps.shape) if size > 1]
        if len(axes) > 1:  # a grouped transposed convolution: no axis has its channels
            one = self._constant("codes.1", np.array(1, dtype=np.float32))
            plain = ir.node("DequantizeLinear", [codes, one])
            factor = self._constant(f"{base}_scale", steps)
            return [plain, ir.node("Mul", [plain.outputs[0], factor])]
        attributes = {"axis": axes[0]} if axes else {}
        factor = self._constant(f"{base}_scale", steps.reshape(-1) if axes else steps.reshape(()))
        inputs = [codes, factor]
        if zeros:
            values = np.zeros(steps.reshape(-1).shape if axes else (), dtype=np.int8)
            inputs.append(self._constant(f"{base}_zeros", values))
        return [ir.node("DequantizeLinear", inputs, attributes)]

    def _float_weight(self, node: ir.Node) -> list[ir.Node]:
        codes, scale = inputs_of(node)
        form = FORMATS[node.attributes["format"].as_string()]
        base = f"{stem(str(codes.name))}.weight"
        numbers = decode(torch.from_numpy(constant_values(codes)), form).numpy()
        stored = self._constant(base, numbers.astype(STORED_FLOATS[form]))
        return self._scaled(stored, base, constant_values(scale), zeros=False)

    def _float_activation(self, node: ir.Node) -> list[ir.Node]:
        """Write a pair of QuantizeLinear, which saturates, and DequantizeLinear.

        A Relu or Clip before it becomes Max and Min: ONNX Runtime removes a Relu before a
        QuantizeLinear of zero point 0, although these codes have a sign, and does not load a Clip.
        """
        x, scale = inputs_of(node)
        base = node.attributes["title"].as_string()
        form = FORMATS[node.attributes["format"].as_string()]
        step = self._constant(f"{base}.scale", constant_values(scale))
        zero_point = self._constant(f"{base}.zero_point", np.zeros((), STORED_FLOATS[form]))
        nodes: list[ir.Node] = []
        maker = x.producer()
        if maker is not None and maker.op_type in {"Relu", "Clip"}:
            x = maker.inputs[0]
            for kind, bound in zip(("Max", "Min"), _bounds(maker), strict=True):
                if np.isfinite(bound):
                    limit = self._constant(f"float.{bound:g}", np.array(bound, np.float32))
                    nodes.append(ir.node(kind, [x, limit]))
                    x = nodes[-1].outputs[0]
        nodes.append(ir.node("QuantizeLinear", [x, step, zero_point]))
        nodes.append(ir.node("DequantizeLinear", [nodes[-1].outputs[0], step, zero_point]))
        self.titles |= {made: f"{base}.{kind_of(made)}" for made in nodes}
        return nodes

    def _bias(self, node: ir.Node) -> list[ir.Node]:
        codes, activation_scale, weight_scale = inputs_of(node)
        base = f"{stem(str(codes.name))}.bias"
        stored = self._constant(base, constant_values(codes))
        steps = constant_values(activation_scale) * constant_values(weight_scale).reshape(-1)
        if steps.size == 1:  # of a weight with one scale for all channels
            factor = self._constant(f"{base}_scale", steps.reshape(()))
            return [ir.node("DequantizeLinear", [stored, factor])]
        factor = self._constant(f"{base}_scale", steps)
        return [ir.node("DequantizeLinear", [stored, factor], {"axis": 0})]

    def _has_float_bias(self, node: ir.Node) -> bool:
        """Return whether a bias is float: in signed forms, and, of pairs, where a sum adds it.

        A linear layer of more than two dimensions is a product and a sum.
        """
        of_layers = all(use.idx == 2 for use in node.outputs[0].uses())
        return self.form.signed or (self.form.only_pairs and not of_layers)

    def _float_bias(self, node: ir.Node) -> ir.Value:
        codes, activation_scale, weight_scale = inputs_of(node)
        steps = constant_values(activation_scale) * constant_values(weight_scale).reshape(-1)
        bias = constant_values(codes).astype(np.float32) * steps
        return self._constant(f"{stem(str(codes.name))}.bias", bias)

    def _constant(
        self, name: str, array: np.ndarray[Any, Any], kind: ir.DataType | None = None
    ) -> ir.Value:
        """Return the initializer of this name and value; create it if needed."""
        tensor = ir.tensor(array, dtype=kind, name=name)
        while (known := self.graph.initializers.get(name)) is not None:
            old = known.const_value
            same_type = old is not None and (old.dtype, old.shape) == (tensor.dtype, tensor.shape)
            if same_type and np.array_equal(constant_values(known), array):
                return known
            name += "_"
            tensor.name = name
        value = ir.Value(name=name, const_value=tensor)
        self.graph.register_initializer(value)
        return value


def _clips_less(
    node: ir.Node, scale: np.ndarray[Any, Any], zero_point: np.ndarray[Any, Any], highest: int
) -> bool:
    """Return whether a node only clips, and only what codes of 0 to `highest` clip, too."""
    bounds = (np.array([_bounds(node)]) / scale).round() + zero_point
    return bool(bounds[..., 0].max() <= 0 and bounds[..., 1].min() >= highest)


def _rectified(
    node: ir.Node | None,
    scale: np.ndarray[Any, Any],
    zero_point: np.ndarray[Any, Any],
    highest: int,
) -> ir.Value | None:
    """Return what a node clips at 0 and at an upper end that clips no more than codes do, or None.

    A Relu then does the same.
    """
    low, high = (np.nan, np.nan) if node is None else _bounds(node)
    clips_alike = low == 0 and float((high / scale).round() + zero_point) >= highest
    if node is None or node.op_type == "Relu" or not clips_alike:
        return None
    return node.inputs[0]


def _bounds(node: ir.Node) -> tuple[float, float]:
    """Return the bounds of an operator that clips its first input, or NaN for any other."""
    if node.op_type == "Relu":
        return 0.0, np.inf
    ends = [_number(value) for value in node.inputs[1:]]
    if node.op_type == "Clip":
        low, high = [*ends, None, None][:2]
        return -np.inf if low is None else low, np.inf if high is None else high
    if node.op_type in {"Max", "Min"} and len(ends) == 1 and ends[0] is not None:
        return (ends[0], np.inf) if node.op_type == "Max" else (-np.inf, ends[0])
    return np.nan, np.nan


def _number(value: ir.Value | None) -> float | None:
    """Return a bound: NaN if it is computed or not one number, None if there is none."""
    if value is None:
        return None
    if value.const_value is None or value.const_value.size != 1:
        return np.nan
    return float(constant_values(value).item())
