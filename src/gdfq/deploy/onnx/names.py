"""Names in an ONNX file that a person recognises, and nothing that says where it was made."""

import re
from collections.abc import Mapping, Sequence

import onnx_ir as ir

from gdfq.functional.grid import MAX_BITS
from gdfq.student.integer_network import ActivationGrid

_CONSTANT_NAME = re.compile(r"\.(weight|bias)\.")
_GENERATED_PREFIXES = ("codes.", "float.", "val_", "min_val", "max_val")
"""Constants that say nothing about the nodes they enter: ours, and the exporter's."""
_SHORT = {"QuantizeLinear": "q", "DequantizeLinear": "dq"}


def rename(graph: ir.Graph, titles: Mapping[ir.Node, str]) -> None:
    """Short names that a person recognises: each node has that of its value.

    titles: those of some nodes, which no other gets. Of several values each has its number behind.

    What dequantizes constants stays without a node name; that saves a few percent of a small file.
    """
    outputs = {value.name for value in graph.outputs}
    inputs = {value.name for value in graph.inputs}
    taken = {*graph.initializers, *inputs, *outputs, *titles.values()}
    for node in graph:
        name = titles.get(node) or _title(node)
        unique, count = name, 0
        while node not in titles and unique in taken:
            count += 1
            unique = f"{name}_{count}"
        names = [unique] if len(node.outputs) == 1 else _numbered(unique, len(node.outputs))
        taken |= {unique, *names}
        node.name = None if _CONSTANT_NAME.search(name) else unique
        for value, new in zip(node.outputs, names, strict=True):
            if not value.is_graph_output():
                value.name = new


def codes_name(grid: ActivationGrid) -> str:
    """The name, in the ONNX graph, of the codes of an activation."""
    return f"{grid.name}.{'clip' if grid.bits != MAX_BITS else 'q'}"


def _numbered(name: str, count: int) -> list[str]:
    return [f"{name}.{index}" for index in range(count)]


def kind_of(node: ir.Node) -> str:
    return _SHORT.get(node.op_type, node.op_type.lower())


def _title(node: ir.Node) -> str:
    """`layer1.conv1` for a layer, `relu.q` for what quantizes a ReLU's output, else the operator.

    Where constants enter they say what the node is about.
    """
    kind = kind_of(node)
    names = ["" if value is None else str(value.name) for value in node.inputs]
    # A weight, or one that is made of it: `conv.weight`, `conv.weight.dq`.
    layer, of_weight, _ = f"{names[1]}.".rpartition(".weight.") if len(names) > 1 else ("", "", "")
    if of_weight:
        return layer
    for value in node.inputs:
        if (
            value is not None
            and value.is_initializer()
            and not str(value.name).startswith(_GENERATED_PREFIXES)
        ):
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


def strip(model: ir.Model) -> None:
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
