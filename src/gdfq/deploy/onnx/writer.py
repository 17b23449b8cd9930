"""The ONNX file of an integer network: packed codes on disk, integer kernels when it runs.

`torch.onnx.export` writes the graph, in which the quantization operators stay opaque; a pass
over the result then replaces each by standard operators. Weights of 4 bits and below are
packed INT4 (INT2 at 2 bits), followed by a `Cast` to INT8 that a runtime folds when it loads the
file: small on disk, and kernels read 8-bit integers (other
forms: `deploy.onnx.form`). Activations are unsigned 8-bit codes; where
values may lie beyond those of their number of bits, an integer `Clip` follows (`StoredCodes`).
"""

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, fx

from gdfq.data.preprocessing import Preprocessing
from gdfq.deploy.onnx.barriers import add_barriers
from gdfq.deploy.onnx.codes import stored_codes, stored_tokens
from gdfq.deploy.onnx.equivalents import with_equivalents
from gdfq.deploy.onnx.form import PACKED_WEIGHTS, Form
from gdfq.deploy.onnx.lowering import lower
from gdfq.deploy.onnx.names import kind_of, rename, strip
from gdfq.deploy.onnx.passes import (
    DOMAIN,
    constant_values,
    inputs_of,
    keep_codes,
    keep_float,
    keep_float_biases,
    normalise_pixels,
    pool_globally,
    quantize_after_moves,
    remove_unused,
    replace_node,
)
from gdfq.deploy.onnx.sizes import PACKED, STORED_FLOATS
from gdfq.deploy.onnx.tokens import (
    Matrix,
    RoundedTokens,
    float_matrix,
    multiply_codes,
    round_tokens,
)
from gdfq.errors import GdfqError, UsageError, first_line
from gdfq.execution.tracing import exclusive_tracing
from gdfq.functional import float_grid, grid
from gdfq.functional.float_grid import FORMATS, decode
from gdfq.functional.grid import code_bounds
from gdfq.graph.inputs import InputSpec
from gdfq.graph.rewrite import Copy, rewrite
from gdfq.graph.tensors import flat_module
from gdfq.student.integer_network import IntegerNetwork, stem

_OPSET, _OPSET_OF_INT2 = 21, 25
_MAX_SAFE_CODE = 63
"""Largest magnitude of weight codes that cannot overflow the kernels of processors without VNNI."""


def to_onnx(
    network: IntegerNetwork,
    inputs: Sequence[InputSpec],
    metadata: Mapping[str, str],
    raw_input: Preprocessing | None = None,
    outputs: Sequence[str] = ("logits",),
    form: Form = PACKED_WEIGHTS,
) -> bytes:
    """Return an integer network as an ONNX model, which takes batches of any length.

    Args:
        network: The integer network.
        inputs: Specifications of its inputs.
        metadata: Metadata of the file.
        raw_input: Normalisation in the model, which then takes uint8 pixels.
        outputs: Names of the outputs.
        form: The variant of the file.

    Raises:
        UsageError: ONNX, or the opset of the form, has no form for an operator.
        GdfqError: The result is not a valid model.
    """
    model = _exported(_opaque(network, form), inputs)
    try:
        _rewrite(model, metadata, raw_input, inputs, outputs, form)
        return _serialised(model)
    except GdfqError:
        raise
    except Exception as error:  # of the libraries that hold and check the graph
        raise GdfqError(
            "the network must become a valid ONNX model; writing it failed with: "
            f"{first_line(error)}. Report the network; export it with --target safetensors or pt2."
        ) from error


def _rewrite(
    model: ir.Model,
    metadata: Mapping[str, str],
    raw_input: Preprocessing | None,
    inputs: Sequence[InputSpec],
    outputs: Sequence[str],
    form: Form,
) -> None:
    """Turn the exported graph into standard operators, with readable names and metadata."""
    graph = model.graph
    for i, value in enumerate(graph.outputs):
        if any(value is other for other in graph.outputs[:i]):  # returned twice
            copy = ir.node("Identity", [value])
            graph.append(copy)
            graph.outputs[i] = copy.outputs[0]
    names = (*(spec.name for spec in inputs), *outputs)
    for value, name in zip((*graph.inputs, *graph.outputs), names, strict=True):
        value.name = name
    pool_globally(graph)
    if form.lowest_opset:
        lower(model)
    writer = _Writer(graph, form, by_token=any(spec.kind == "tokens" for spec in inputs))
    for node in list(graph):
        if node.domain == DOMAIN:
            writer.write(node)
    multiply_codes(graph, writer.tokens, writer.matrices)
    if form.only_pairs:
        quantize_after_moves(graph)
    else:
        keep_codes(graph)
        if form.has_barriers:
            add_barriers(graph)
        keep_float(graph)
        keep_float_biases(graph)
    if raw_input is not None:
        normalise_pixels(graph, raw_input)
    rename(graph, writer.titles)
    strip(model)
    model.opset_imports.pop(DOMAIN, None)
    constants = (value.const_value for value in graph.initializers.values())
    if any(tensor is not None and tensor.dtype == ir.DataType.INT2 for tensor in constants):
        # Between the two, the operators that are used here only gained types.
        model.opset_imports[""] = _OPSET_OF_INT2
        model.ir_version = 13
    model.producer_name, model.producer_version = "gdfq", metadata.get("gdfq", "")
    model.metadata_props.update(metadata)


def _serialised(model: ir.Model) -> bytes:
    import onnx

    proto = ir.to_proto(model)
    del proto.graph.value_info[:]  # readers infer shapes; stored shapes cost space
    onnx.checker.check_model(proto)
    return bytes(proto.SerializeToString(deterministic=True))


def _symbol(
    name: str, value: Tensor, inputs: tuple[Tensor, ...], **attributes: int | str
) -> Tensor:
    """Return an operator of the domain `gdfq`, with the shape and type of `value`."""
    made: Tensor = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{name}",
        inputs,
        {**attributes},
        dtype=torch.float32,
        shape=value.shape,
        version=1,
    )
    return made


def _fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    title: str,
    lowest: int,
    needs_clip: bool,
    adds_zero: bool,
) -> Tensor:
    return _symbol(
        "FakeQuantize",
        x,
        (x, scale, zero_point),
        bits=bits,
        title=title,
        lowest=lowest,
        needs_clip=int(needs_clip),
        adds_zero=int(adds_zero),
    )


def _fake_quantize_tokens(x: Tensor, bits: int, title: str) -> Tensor:
    return _symbol("FakeQuantizeTokens", x, (x,), bits=bits, title=title)


def _dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    return _symbol("Dequantize", codes, (codes, scale, zero_point), bits=bits)


def _dequantize_bias(codes: Tensor, activation_scale: Tensor, weight_scale: Tensor) -> Tensor:
    return _symbol("DequantizeBias", codes, (codes, activation_scale, weight_scale))


def _fake_quantize_float(x: Tensor, scale: Tensor, form: str, title: str) -> Tensor:
    return _symbol("FakeQuantizeFloat", x, (x, scale), format=form, title=title)


def _dequantize_float(codes: Tensor, scale: Tensor, form: str) -> Tensor:
    return _symbol("DequantizeFloat", codes, (codes, scale), format=form)


_OPAQUE: dict[Callable[..., Any], Callable[..., Tensor]] = {
    grid.fake_quantize: _fake_quantize,
    grid.fake_quantize_tokens: _fake_quantize_tokens,
    grid.dequantize: _dequantize,
    grid.dequantize_bias: _dequantize_bias,
    float_grid.fake_quantize_float: _fake_quantize_float,
    float_grid.dequantize_float: _dequantize_float,
}


def _opaque(network: IntegerNetwork, form: Form) -> fx.GraphModule:
    """Return the network with quantization operators that tracing does not enter."""
    grids = {grid.node: grid for grid in network.activations}
    tokens = {tokens.node: tokens for tokens in network.tokens}
    stored, stored_by_token = stored_codes(network, form), stored_tokens(network)

    def change(copy: Copy, node: fx.Node) -> fx.Node | None:
        if node.target not in _OPAQUE:
            return None
        new = copy.of(node)
        new.target = _OPAQUE[node.target]
        if node in tokens:
            new.update_kwarg("title", stored_by_token[tokens[node].name].name)
        if node in grids:
            # Constants of equal value become one in the export, so they cannot tell the name.
            new.update_kwarg("title", grids[node].name)
            if grids[node].form is not None:
                return new
            codes = stored[grids[node].name]
            new.update_kwarg("lowest", codes.lowest)
            new.update_kwarg("needs_clip", codes.needs_clip)
            new.update_kwarg("adds_zero", codes.adds_zero)
        return new

    graph = with_equivalents(rewrite(network.graph, change))
    return flat_module(graph, network.tensors).eval()


@contextmanager
def _only_errors(name: str) -> Iterator[None]:
    """Return a context in which a logger only reports errors."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _exported(network: fx.GraphModule, inputs: Sequence[InputSpec]) -> ir.Model:
    """Return the network in ONNX, its quantization operators in a domain of their own."""
    examples = tuple(spec.zeros(2) for spec in inputs)  # a batch of one would become a constant
    try:
        with exclusive_tracing(), _only_errors("torch.onnx"):
            program = torch.onnx.export(
                network,
                examples,
                dynamo=True,
                opset_version=_OPSET,
                dynamic_shapes=tuple(map(_dynamic_sides, inputs)),
                verbose=False,
            )
    except Exception as error:
        raise UsageError(
            f"each operator of the network must have a form in ONNX; {_reason(error)}. "
            "Export with --target safetensors or pt2 instead."
        ) from error
    assert program is not None
    _register_constants(program.model.graph)
    return program.model


def _dynamic_sides(spec: InputSpec) -> dict[int, Any]:
    """Return the dimensions of an input that take any length: the batch, and that of tokens."""
    sides = {0: torch.export.Dim("batch")}
    if spec.vocabulary is not None:
        sides[1] = torch.export.Dim("length", min=2, max=spec.vocabulary.length)
    return sides


def _register_constants(graph: ir.Graph) -> None:
    """Register constants that the exporter's optimization left out of the graph.

    It does so with the bounds of a tensor that is clamped twice (onnxscript 0.7).
    """
    for node in graph:
        for value in inputs_of(node):
            if value is None or value.const_value is None or value.is_initializer():
                continue
            if value.producer() is None and not value.is_graph_input():
                while value.name in graph.initializers:
                    value.name = f"{value.name}_"
                graph.register_initializer(value)


def _reason(error: BaseException) -> str:
    """Return why an export failed: the node that it stopped at, and the first cause."""
    node, cause = "", error
    while True:
        found = re.search(r"node %(\w+)", str(cause))
        node = found[1] if found else node
        if cause.__cause__ is None:
            break
        cause = cause.__cause__
    operator = re.search(r"op='(aten\.\w+)'", str(cause))
    if node and operator:
        return f"{operator[1]} of {node!r} has none"
    where = f" at {node!r}" if node else ""
    return f"the export failed{where} with: {first_line(cause)}"


class _Writer:
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
