"""Readable names in an ONNX file, and removal of what depends on the machine that wrote it."""

import re
from collections.abc import Mapping, Sequence

import onnx_ir as ir

_CONSTANT_NAME = re.compile(r"\.(weight|bias)\.")
_GENERATED_PREFIXES = ("codes.", "float.", "val_", "min_val", "max_val")
"""Prefixes of generated names of constants, which do not name a layer."""
_SHORT = {"QuantizeLinear": "q", "DequantizeLinear": "dq"}


def rename(graph: ir.Graph, titles: Mapping[ir.Node, str]) -> None:
    """Give values and their nodes short readable names.

    Each of several values of a node ends with its number. Nodes that dequantize constants get no
    name, which saves a few percent of a small file.

    Args:
        graph: The graph, changed in place.
        titles: Reserved names of some nodes.
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


def _numbered(name: str, count: int) -> list[str]:
    return [f"{name}.{index}" for index in range(count)]


def kind_of(node: ir.Node) -> str:
    return _SHORT.get(node.op_type, node.op_type.lower())


def _title(node: ir.Node) -> str:
    """Return `layer1.conv1` for a layer, `relu.q` for a ReLU's quantizer, else the operator.

    If the node reads named constants, the title comes from their names.
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
    """Return `value` repeated for 1, 2 and 3 dimensions, and for both ends of each."""
    return [(value,) * count for count in (1, 2, 3, 4, 6)]


_DEFAULTS: tuple[tuple[str, Sequence[object]], ...] = (
    ("auto_pad", ("NOTSET",)),
    ("group", (1,)),
    ("dilations", _each(1)),
    ("strides", _each(1)),
    ("pads", _each(0)),
)
"""Default attributes of convolutions, which are left out."""


def strip(model: ir.Model) -> None:
    """Remove the metadata that the exporter adds about the traced code."""
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
