"""The ONNX file of an integer network: packed codes on disk, integer kernels when it runs.

`torch.onnx.export` writes the graph, in which the quantization operators stay opaque
(`deploy.onnx.exporter`). They are then replaced by standard operators
(`deploy.onnx.quantization`), and passes bring the graph into the form of the target.
"""

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from gdfq.data.preprocessing import Preprocessing
from gdfq.deploy.onnx.barriers import add_barriers
from gdfq.deploy.onnx.exporter import exported, opaque
from gdfq.deploy.onnx.form import PACKED_WEIGHTS, Form
from gdfq.deploy.onnx.lowering import lower
from gdfq.deploy.onnx.names import rename, strip
from gdfq.deploy.onnx.passes import (
    DOMAIN,
    keep_codes,
    keep_float,
    keep_float_biases,
    normalise_pixels,
    pool_globally,
    quantize_after_moves,
)
from gdfq.deploy.onnx.quantization import QuantizationWriter
from gdfq.deploy.onnx.tokens import multiply_codes
from gdfq.errors import GdfqError, first_line
from gdfq.graph.inputs import InputSpec
from gdfq.student.integer_network import IntegerNetwork

_OPSET_OF_INT2 = 25


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
    model = exported(opaque(network, form), inputs)
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
    writer = QuantizationWriter(graph, form, by_token=any(spec.kind == "tokens" for spec in inputs))
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
        # Since the opset of the export, the operators that are used here only gained types.
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
