"""A frozen network as one ONNX file: codes at 4 bits on disk, integer kernels when it runs.

`torch.onnx.export` writes the graph, in which the three quantization operators stay opaque; a pass
over the result then writes each of them in standard operators. Weights of 4 bits and below are
packed INT4 (INT2 at 2 bits) behind a `Cast` to INT8, which a runtime folds when it loads the file:
small on disk, and the kernels see 8-bit integers. Activations are unsigned 8-bit codes that an
integer `Clip` keeps within their true width.
"""

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, fx

from gdfq import grid
from gdfq.capture import flat_module, tensors_of
from gdfq.data import Preprocessing
from gdfq.errors import GdfqError, UsageError, first_line
from gdfq.grid import code_bounds
from gdfq.tracing import quiet_tracing

INPUT = "images"
PIXELS = "pixels."
"""How names begin of what normalises pixels in the file."""

_DOMAIN = "gdfq"
_OPSET, _OPSET_OF_INT2 = 21, 25
_PACKED = {
    2: (ir.DataType.INT2, ml_dtypes.int2),
    3: (ir.DataType.INT4, ml_dtypes.int4),
    4: (ir.DataType.INT4, ml_dtypes.int4),
}
"""Types of weights' codes on disk, by bits; the others are INT8."""
WIDTHS = (2, 4, 8)
"""The widths that fill their type: any other takes as much of a file as the next one of these."""
_ALWAYS_SAFE = 63
"""Weights up to here cannot overflow the kernels of processors without VNNI."""


def to_onnx(
    network: fx.GraphModule,
    input_shape: tuple[int, ...],
    metadata: Mapping[str, str],
    raw_input: Preprocessing | None = None,
    outputs: Sequence[str] = ("logits",),
) -> bytes:
    """A frozen network [N, *input_shape] -> its outputs as an ONNX model, any N.

    metadata: written into the file. outputs: their names. With raw_input the model takes uint8
    pixels and normalises them itself. Raises UsageError for an operator that ONNX has no form for,
    and GdfqError when what was written for it is no valid model.
    """
    model = _exported(_opaque(network), input_shape)
    try:
        _rewrite(model, metadata, raw_input, outputs)
        return _serialised(model)
    except GdfqError:
        raise
    except Exception as error:  # of the libraries that hold and check the graph
        raise GdfqError(
            "the network must become a valid ONNX model; writing it failed with: "
            f"{first_line(error)}. Report the network; export it with --format safetensors or pt2."
        ) from error


def _rewrite(
    model: ir.Model,
    metadata: Mapping[str, str],
    raw_input: Preprocessing | None,
    outputs: Sequence[str],
) -> None:
    """Turn what the exporter wrote into standard operators, with names and metadata of ours."""
    graph = model.graph
    for i, value in enumerate(graph.outputs):
        if any(value is other for other in graph.outputs[:i]):  # returned twice
            copy = ir.node("Identity", [value])
            graph.append(copy)
            graph.outputs[i] = copy.outputs[0]
    for value, name in zip((graph.inputs[0], *graph.outputs), (INPUT, *outputs), strict=True):
        value.name = name
    _pool_globally(graph)
    writer = _Writer(graph)
    for node in list(graph):
        if node.domain == _DOMAIN:
            writer.write(node)
    _keep_codes(graph)
    _keep_float(graph)
    if raw_input is not None:
        _normalise_pixels(graph, raw_input)
    _rename(graph, writer.titles)
    _strip(model)
    model.opset_imports.pop(_DOMAIN, None)
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
    del proto.graph.value_info[:]  # readers infer shapes; written down they cost space
    onnx.checker.check_model(proto)
    return bytes(proto.SerializeToString(deterministic=True))


def weight_sizes(network: fx.GraphModule, data: bytes) -> list[dict[int, int]]:
    """Bytes of the file that each weight takes at each of WIDTHS, for weights of 4 bits.

    network: the frozen network that `to_onnx` made `data` of; weights in its order. Codes, scales,
    zero points and the nodes that dequantize them count. At 8 bits codes are as they multiply:
    without zero point, and nothing is cast.
    """
    import onnx

    graph = onnx.load_from_string(data).graph
    parts = {value.name: _entry(value.ByteSize()) for value in graph.initializer}
    parts |= {node.output[0]: _entry(node.ByteSize()) for node in graph.node}
    sizes = []
    for node in network.graph.nodes:
        if node.target is not grid.dequantize:
            continue
        codes = str(node.args[0].target)
        base = f"{_stem(codes)}.weight"
        count = tensors_of(network)[codes].numel()
        narrow = sum(parts.get(base + part, 0) for part in (".cast", "_zero", ".sub"))
        always = sum(parts.get(base + part, 0) for part in ("", "_scale", "_zeros", ".dq", ".mul"))
        always -= -(-count // 2)
        # A grouped transposed convolution's nodes are named after its weight at 8 bits alone.
        wide = 2 * (len(base) + 4) if f"{base}.mul" in parts else 0
        if not wide and f"{base}_zeros" not in parts:  # which wide weights have, others need not
            steps = tensors_of(network)[str(node.args[1].target)].numel()
            zeros = onnx.numpy_helper.from_array(np.zeros(steps, np.int8), f"{base}_zeros")
            wide = _entry(zeros.ByteSize()) + 3 + len(zeros.name)
        sizes.append(
            {
                bits: always + -(-count * bits // 8) + (narrow if bits in _PACKED else wide)
                for bits in WIDTHS
            }
        )
    return sizes


def _entry(size: int) -> int:
    """Bytes of a message of `size` bytes in a list of a file: its kind, its length and itself."""
    return 1 + max(1, -(-size.bit_length() // 7)) + size


def _symbol(
    name: str, value: Tensor, inputs: tuple[Tensor, ...], **attributes: int | str
) -> Tensor:
    """An operator of our own domain for the exporter, with the shape and type of `value`."""
    made: Tensor = torch.onnx.ops.symbolic(
        f"{_DOMAIN}::{name}",
        inputs,
        {**attributes},
        dtype=torch.float32,
        shape=value.shape,
        version=1,
    )
    return made


def _fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, title: str = ""
) -> Tensor:
    return _symbol("FakeQuantize", x, (x, scale, zero_point), bits=bits, title=title)


def _dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    return _symbol("Dequantize", codes, (codes, scale, zero_point), bits=bits)


def _dequantize_bias(codes: Tensor, activation_scale: Tensor, weight_scale: Tensor) -> Tensor:
    return _symbol("DequantizeBias", codes, (codes, activation_scale, weight_scale))


_OPAQUE: dict[Callable[..., Any], Callable[..., Tensor]] = {
    grid.fake_quantize: _fake_quantize,
    grid.dequantize: _dequantize,
    grid.dequantize_bias: _dequantize_bias,
}


def codes_name(quantizer: fx.Node) -> str:
    """The name, in the ONNX graph, of the codes that a node of the frozen graph quantizes to."""
    return f"{_quantizer_title(quantizer)}.{'clip' if quantizer.args[3] != 8 else 'q'}"


def _quantizer_title(quantizer: fx.Node) -> str:
    """The name of an activation quantizer, which no other has: that of its constants."""
    scale = quantizer.args[1]
    assert isinstance(scale, fx.Node)
    return _stem(str(scale.target))


def _opaque(network: fx.GraphModule) -> fx.GraphModule:
    """The network with its quantization operators as ones that tracing does not look into."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(network.graph, {}))
    for node in graph.nodes:
        if node.target is grid.fake_quantize:
            # Constants of equal value become one in the export, so they cannot tell the name.
            node.update_kwarg("title", _quantizer_title(node))
        node.target = _OPAQUE.get(node.target, node.target)
    return flat_module(graph, tensors_of(network)).eval()


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Let a logger say errors alone."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _exported(network: fx.GraphModule, input_shape: tuple[int, ...]) -> ir.Model:
    """The network in ONNX, the quantization operators in a domain of their own."""
    example = torch.zeros(2, *input_shape)  # a batch of one would be taken for a constant
    try:
        with quiet_tracing(), _quiet("torch.onnx"):
            program = torch.onnx.export(
                network,
                (example,),
                dynamo=True,
                opset_version=_OPSET,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                verbose=False,
            )
    except Exception as error:
        raise UsageError(
            "each operator of the network must have a form in ONNX; the export failed with: "
            f"{first_line(error)}. Export with --format safetensors or pt2 instead."
        ) from error
    assert program is not None
    return program.model


class _Writer:
    """Writes the quantization operators of a graph in standard ones."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.titles: dict[ir.Node, str] = {}
        """Names of the nodes that quantize activations."""

    def write(self, node: ir.Node) -> None:
        form = {
            "FakeQuantize": self._activation,
            "Dequantize": self._weight,
            "DequantizeBias": self._bias,
        }[node.op_type]
        inputs = _inputs(node)
        _replace(self.graph, node, form(node))
        maker = inputs[0].producer()
        if maker is not None and not inputs[0].uses():
            self.graph.remove(maker, safe=True)
        for value in inputs:  # of what was the operator's own
            if not value.uses() and value.name in self.graph.initializers:
                del self.graph.initializers[value.name]

    def _activation(self, node: ir.Node) -> list[ir.Node]:
        """Signed codes of k bits become unsigned ones: q + 2^(k−1), and so their zero point."""
        x, scale, zero_point = _inputs(node)
        bits, base = node.attributes["bits"].as_int(), node.attributes["title"].as_string()
        lowest, highest = code_bounds(bits)
        unsigned = (_array(zero_point) - lowest).astype(np.uint8)
        maker = x.producer()
        bounds = (np.array([_bounds(maker)]) / _array(scale)).round() + unsigned
        if bounds[..., 0].max() <= 0 and bounds[..., 1].min() >= highest - lowest:
            x = maker.inputs[0]  # what it cuts off is lost to the quantizer as well
        step = self._constant(f"{base}.scale", _array(scale))
        new_zero_point = self._constant(f"{base}.zero_point", unsigned)
        quantized = ir.node("QuantizeLinear", [x, step, new_zero_point])
        nodes = [quantized]
        if bits < 8:
            # Unsigned codes are never below 0.
            top = self._constant(f"codes.{highest - lowest}", np.array(highest - lowest, np.uint8))
            nodes.append(ir.node("Clip", [quantized.outputs[0], None, top]))
        codes = nodes[-1].outputs[0]
        nodes.append(ir.node("DequantizeLinear", [codes, step, new_zero_point]))
        self.titles |= {made: f"{base}.{_kind(made)}" for made in nodes}
        return nodes

    def _weight(self, node: ir.Node) -> list[ir.Node]:
        codes, scale, zero_point = _inputs(node)
        bits = node.attributes["bits"].as_int()
        base = f"{_stem(codes.name)}.weight"
        values, steps, offsets = _array(codes), _array(scale), _array(zero_point)
        nodes: list[ir.Node] = []
        if bits in _PACKED:
            kind, numbers = _PACKED[bits]
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
        axes = [axis for axis, size in enumerate(steps.shape) if size > 1]
        if len(axes) > 1:  # a grouped transposed convolution: no axis has its channels
            one = self._constant("codes.1", np.array(1, dtype=np.float32))
            nodes.append(ir.node("DequantizeLinear", [current, one]))
            factor = self._constant(f"{base}_scale", steps)
            return [*nodes, ir.node("Mul", [nodes[-1].outputs[0], factor])]
        attributes = {"axis": axes[0]} if axes else {}
        factor = self._constant(f"{base}_scale", steps.reshape(-1) if axes else steps.reshape(()))
        inputs = [current, factor]
        wide = int(np.abs(values - offsets).max(initial=0)) > _ALWAYS_SAFE
        if wide or any(user.op_type == "Gemm" for user in node.outputs[0].consumers()):
            # ONNX Runtime fuses a Gemm only with a zero point that is written down, and where it
            # makes wide weights unsigned (`runtimes.PRECISE`) it would add one of a wrong shape.
            zeros = np.zeros(steps.reshape(-1).shape if axes else (), dtype=np.int8)
            inputs.append(self._constant(f"{base}_zeros", zeros))
        return [*nodes, ir.node("DequantizeLinear", inputs, attributes)]

    def _bias(self, node: ir.Node) -> list[ir.Node]:
        codes, activation_scale, weight_scale = _inputs(node)
        base = f"{_stem(codes.name)}.bias"
        stored = self._constant(base, _array(codes))
        steps = _array(activation_scale) * _array(weight_scale).reshape(-1)
        if steps.size == 1:  # of a weight that has one step for all channels
            factor = self._constant(f"{base}_scale", steps.reshape(()))
            return [ir.node("DequantizeLinear", [stored, factor])]
        factor = self._constant(f"{base}_scale", steps)
        return [ir.node("DequantizeLinear", [stored, factor], {"axis": 0})]

    def _constant(
        self, name: str, array: np.ndarray[Any, Any], kind: ir.DataType | None = None
    ) -> ir.Value:
        """An initializer of this name and value, new if there is none."""
        tensor = ir.tensor(array, dtype=kind, name=name)
        while (known := self.graph.initializers.get(name)) is not None:
            old = known.const_value
            same_type = old is not None and (old.dtype, old.shape) == (tensor.dtype, tensor.shape)
            if same_type and np.array_equal(_array(known), array):
                return known
            name += "_"
            tensor.name = name
        value = ir.Value(name=name, const_value=tensor)
        self.graph.register_initializer(value)
        return value


def _bounds(node: ir.Node | None) -> tuple[float, float]:
    """Below and above which an operator that cuts numbers off does so; NaN for any other."""
    if node is not None and node.op_type == "Relu":
        return 0.0, np.inf
    if node is not None and node.op_type == "Clip" and len(node.inputs) == 3:
        low, high = node.inputs[1:]
        if all(value is not None and value.const_value is not None for value in (low, high)):
            return float(_array(low)), float(_array(high))
    return np.nan, np.nan


def _inputs(node: ir.Node) -> tuple[Any, ...]:
    return tuple(node.inputs)


def _replace(graph: ir.Graph, node: ir.Node, nodes: Sequence[ir.Node]) -> None:
    """Put nodes in the place of one; the last of them make its values, each one."""
    graph.insert_before(node, nodes)
    makers = nodes[-len(node.outputs) :]
    for old, (new,) in zip(node.outputs, (maker.outputs for maker in makers), strict=True):
        new.name, new.shape, new.type = old.name, old.shape, old.type
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _array(value: ir.Value | None) -> np.ndarray[Any, Any]:
    """The numbers of a constant."""
    if value is None or value.const_value is None:
        raise GdfqError("the quantization constants must be known at export; one is computed.")
    return value.const_value.numpy()


def _stem(name: str | None) -> str:
    """`layer1.conv1` for `quantized.layer1.conv1.codes`."""
    assert name is not None
    return name.rpartition(".")[0].partition(".")[2]


def _pool_globally(graph: ir.Graph) -> None:
    """Means over all spatial dimensions as GlobalAveragePool, which has integer kernels.

    Kernels fuse it with the quantization behind it, which so comes before the Flatten.
    """
    for node in list(graph):
        if node.op_type != "ReduceMean" or len(node.inputs) < 2:
            continue
        x, axes = _inputs(node)
        rank = None if x.shape is None else x.shape.rank()
        if rank is None or rank < 3:
            continue
        if sorted(axis % rank for axis in _array(axes).reshape(-1).tolist()) != [*range(2, rank)]:
            continue
        pooled = ir.node("GlobalAveragePool", [x])
        if node.attributes["keepdims"].as_int():
            _replace(graph, node, [pooled])
            continue
        (old,) = node.outputs
        users = {use.node for use in old.uses()}
        quantizer = users.pop() if len(users) == 1 else None
        if quantizer is None or quantizer.op_type != "FakeQuantize":
            _replace(graph, node, [pooled, _flatten(pooled)])
            continue
        quantized = ir.node(
            "FakeQuantize",
            [pooled.outputs[0], *quantizer.inputs[1:]],
            quantizer.attributes,
            domain=_DOMAIN,
        )
        _replace(graph, quantizer, [pooled, quantized, _flatten(quantized)])
        graph.remove(node, safe=True)


def _flatten(node: ir.Node) -> ir.Node:
    return ir.node("Flatten", [node.outputs[0]], {"axis": 1})


_MOVES_NUMBERS = frozenset(
    {
        *("Expand", "Flatten", "MaxPool", "Pad", "Reshape", "Slice", "Split", "Squeeze"),
        *("Transpose", "Unsqueeze"),
    }
)


def _keep_codes(graph: ir.Graph) -> None:
    """Let operators that only move numbers move codes: what follows then reads integers."""
    for node in list(graph):
        if node.op_type not in _MOVES_NUMBERS:
            continue
        first, *others = _inputs(node)
        dequantize = first.producer()
        if dequantize is None or dequantize.op_type != "DequantizeLinear":
            continue
        codes, scale, *zero_points = _inputs(dequantize)
        if not zero_points or _array(zero_points[0]).dtype != np.uint8:
            continue  # a weight
        (zero_point,) = zero_points
        if node.op_type == "Pad" and _mode(node) == "constant":
            if len(others) > 1 and others[1] is not None and _array(others[1]).any():
                continue  # what it pads with need not lie on the grid
            others[1:2] = [zero_point]
        count = len(node.outputs)
        moved = ir.node(node.op_type, [codes, *others], node.attributes, num_outputs=count)
        after = [ir.node("DequantizeLinear", [value, scale, zero_point]) for value in moved.outputs]
        _replace(graph, node, [moved, *after])
        if not first.uses():
            graph.remove(dequantize, safe=True)


def _keep_float(graph: ir.Graph) -> None:
    """Let layers with float weights, and poolings with borders, be computed in float.

    Between DequantizeLinear and QuantizeLinear ONNX Runtime would round such weights to 8 bits by
    itself, and its integer pooling counts the cells of borders otherwise. A Clip that clips nothing
    hides the first from it.
    """
    for node in list(graph):
        first = node.inputs[0] if node.inputs else None
        maker = None if first is None else first.producer()
        if maker is None or maker.op_type != "DequantizeLinear":
            continue
        weight = node.inputs[1] if node.op_type in _LAYERS else None
        attributes = {name: value.value for name, value in node.attributes.items()}
        borders = any(attributes.get("pads", ())) or bool(attributes.get("ceil_mode"))
        if (weight is not None and weight.is_initializer()) or (
            node.op_type == "AveragePool" and borders
        ):
            low, high = (
                ir.Value(name=name, const_value=ir.tensor(bound, name=name))
                for name, bound in zip(("float.low", "float.high"), _FLOATS, strict=True)
            )
            for value in (low, high):
                if value.name not in graph.initializers:
                    graph.register_initializer(value)
            bounds = [graph.initializers["float.low"], graph.initializers["float.high"]]
            hidden = ir.node("Clip", [first, *bounds])
            graph.insert_before(node, [hidden])
            node.replace_input_with(0, hidden.outputs[0])


_LAYERS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_FLOATS = (np.finfo(np.float32).min, np.finfo(np.float32).max)


def _mode(pad: ir.Node) -> str:
    mode = pad.attributes.get("mode")
    return "constant" if mode is None else mode.as_string()


def _normalise_pixels(graph: ir.Graph, preprocessing: Preprocessing) -> None:
    """Let the graph begin with uint8 pixels: (x / 255 − mean) / std as one factor and one shift."""
    old = graph.inputs[0]
    assert old.shape is not None
    mean, std = (np.array(v, dtype=np.float32) for v in (preprocessing.mean, preprocessing.std))
    shape = (1, len(mean), *[1] * (old.shape.rank() - 2))
    new = ir.Value(name=INPUT, type=ir.TensorType(ir.DataType.UINT8), shape=old.shape)
    values = {f"{PIXELS}factor": 1 / (255 * std), f"{PIXELS}shift": -mean / std}
    constants = []
    for name, numbers in values.items():
        value = ir.Value(name=name, const_value=ir.tensor(numbers.reshape(shape), name=name))
        graph.register_initializer(value)
        constants.append(value)
    cast = ir.node("Cast", [new], {"to": ir.DataType.FLOAT})
    scaled = ir.node("Mul", [cast.outputs[0], constants[0]])
    shifted = ir.node("Add", [scaled.outputs[0], constants[1]])
    ir.convenience.replace_all_uses_with(old, shifted.outputs[0])
    old.name = None
    graph.inputs[0] = new
    first = next(iter(graph))
    graph.insert_before(first, [cast, scaled, shifted])


def _rename(graph: ir.Graph, titles: Mapping[ir.Node, str]) -> None:
    """Short names that a person recognises: each node has that of its value.

    titles: those of some nodes, which no other gets. Of several values each has its number behind.

    What dequantizes constants stays without a node name; that saves a few percent of a small file.
    """
    outputs = {value.name for value in graph.outputs}
    taken = {*graph.initializers, INPUT, *outputs, *titles.values()}
    for node in graph:
        name = titles.get(node) or _title(node)
        unique, count = name, 0
        while node not in titles and unique in taken:
            count += 1
            unique = f"{name}_{count}"
        names = [unique] if len(node.outputs) == 1 else _numbered(unique, len(node.outputs))
        taken |= {unique, *names}
        node.name = None if _OF_CONSTANTS.search(name) else unique
        for value, new in zip(node.outputs, names, strict=True):
            if not value.is_graph_output():
                value.name = new


def _numbered(name: str, count: int) -> list[str]:
    return [f"{name}.{index}" for index in range(count)]


_OF_CONSTANTS = re.compile(r"\.(weight|bias)\.")
_OWN = ("codes.", "float.", "val_", "min_val", "max_val")
"""Constants that say nothing about the nodes they enter: ours, and the exporter's."""
_SHORT = {"QuantizeLinear": "q", "DequantizeLinear": "dq"}


def _kind(node: ir.Node) -> str:
    return _SHORT.get(node.op_type, node.op_type.lower())


def _title(node: ir.Node) -> str:
    """`layer1.conv1` for a layer, `relu.q` for what quantizes a ReLU's output, else the operator.

    Where constants enter they say what the node is about.
    """
    kind = _kind(node)
    names = ["" if value is None else str(value.name) for value in node.inputs]
    # A weight, or one that is made of it: `conv.weight`, `conv.weight.dq`.
    layer, of_weight, _ = f"{names[1]}.".rpartition(".weight.") if len(names) > 1 else ("", "", "")
    if of_weight:
        return layer
    for value in node.inputs:
        if value is not None and value.is_initializer() and not str(value.name).startswith(_OWN):
            return re.sub(r"[._](scale|zero|zero_point)$", "", str(value.name)) + f".{kind}"
    if names and names[0].endswith(".q"):
        return names[0].removesuffix("q") + kind
    return kind


def _each(value: int) -> list[tuple[int, ...]]:
    """`value` for each of one, two and three dimensions, and for both ends of them."""
    return [(value,) * count for count in (1, 2, 3, 4, 6)]


_DEFAULTS: tuple[tuple[str, Sequence[object]], ...] = (
    ("auto_pad", ("NOTSET",)),
    ("group", (1,)),
    ("dilations", _each(1)),
    ("strides", _each(1)),
    ("pads", _each(0)),
)
"""Attributes of convolutions that need not be written down."""


def _strip(model: ir.Model) -> None:
    """Remove what the export notes about the code that it ran."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.name, model.graph.doc_string = "gdfq", None
    for node in model.graph:
        for attribute, default in _DEFAULTS:
            found = node.attributes.get(attribute)
            value = None if found is None else found.value
            if (tuple(value) if isinstance(value, list) else value) in default:
                del node.attributes[attribute]
        if "Conv" in node.op_type:
            node.attributes.pop("kernel_shape", None)  # that of the weight
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
        value.doc_string = None
