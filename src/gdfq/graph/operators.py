"""The operators a network may consist of, and what each is to a quantizer.

This table is the only place that knows operator names. A captured or stored graph may call
nothing else: the file format's safety rests on it (`artifacts/graphs.py`).
"""

import math
import operator
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from gdfq.functional import grid

CONVOLUTIONS = frozenset(
    f"aten.conv{d}d.{form}" for d in (1, 2, 3) for form in ("default", "padding")
)
TRANSPOSED_CONVOLUTIONS = frozenset(
    {"aten.conv_transpose1d.default", "aten.conv_transpose2d.input", "aten.conv_transpose3d.input"}
)
LINEARS = frozenset({"aten.linear.default"})
WEIGHTED = CONVOLUTIONS | TRANSPOSED_CONVOLUTIONS | LINEARS
"""Operators (input, weight, bias, ...) whose weight is quantized."""

BATCH_NORM = "aten.batch_norm.default"

# Operators that only move numbers, so that a quantized input gives an output on the same grid.
GRID_PRESERVING = frozenset(
    {
        "aten.adaptive_max_pool2d.default",
        "aten.amax.default",
        "aten.amin.default",
        "aten.channel_shuffle.default",
        "aten.chunk.default",
        "aten.clone.default",
        "aten.constant_pad_nd.default",
        "aten.contiguous.default",
        "aten.expand.default",
        "aten.flatten.using_ints",
        "aten.flip.default",
        "aten.max.dim",
        "aten.max_pool1d.default",
        "aten.max_pool2d.default",
        "aten.max_pool3d.default",
        "aten.min.dim",
        "aten.movedim.int",
        "aten.pad.default",
        "aten.permute.default",
        "aten.pixel_shuffle.default",
        "aten.pixel_unshuffle.default",
        "aten.reflection_pad2d.default",
        "aten.repeat.default",
        "aten.replication_pad2d.default",
        "aten.reshape.default",
        "aten.roll.default",
        "aten.select.int",
        "aten.slice.Tensor",
        "aten.split.Tensor",
        "aten.split_with_sizes.default",
        "aten.squeeze.default",
        "aten.squeeze.dim",
        "aten.squeeze.dims",
        "aten.t.default",
        "aten.transpose.int",
        "aten.unbind.int",
        "aten.unflatten.int",
        "aten.unsqueeze.default",
        "aten.upsample_nearest1d.vec",
        "aten.upsample_nearest2d.vec",
        "aten.upsample_nearest3d.vec",
    }
)

POOLING = frozenset(
    {
        "aten.adaptive_avg_pool1d.default",
        "aten.adaptive_avg_pool2d.default",
        "aten.adaptive_avg_pool3d.default",
        "aten.avg_pool1d.default",
        "aten.avg_pool2d.default",
        "aten.avg_pool3d.default",
        "aten.mean.default",
        "aten.mean.dim",
        "aten.sum.dim_IntList",
    }
)
MERGING = frozenset(
    {
        "aten.add.Tensor",
        "aten.bmm.default",
        "aten.cat.default",
        "aten.div.Tensor",
        "aten.matmul.default",
        "aten.mul.Tensor",
        "aten.stack.default",
        "aten.sub.Tensor",
    }
)
MAX_POOLING = frozenset(f"aten.max_pool{d}d.default" for d in (1, 2, 3)) | {
    "aten.adaptive_max_pool2d.default"
}

PRODUCTS = frozenset({"aten.bmm.default", "aten.matmul.default"})
JOINS = frozenset({"aten.cat.default", "aten.stack.default"})
SUMS = frozenset({"aten.add.Tensor", "aten.sub.Tensor"})
SOFTMAX = frozenset({"aten.softmax.int"})

AFFINE = frozenset(f"aten.{name}.Tensor" for name in ("add", "sub", "mul", "div"))

INTEGER_CONSUMERS = WEIGHTED | POOLING | MERGING | MAX_POOLING
"""Operators that an integer runtime computes from quantized inputs: the `full` placement."""

_OTHERS = frozenset(
    f"aten.{name}"
    for name in [
        "_to_copy.default",
        "abs.default",
        "adaptive_max_pool1d.default",
        "adaptive_max_pool3d.default",
        "add.Scalar",
        "addcmul.default",
        "arange.default",
        "arange.start",
        "baddbmm.default",
        "broadcast_to.default",
        "celu.default",
        "clamp.default",
        "clamp_max.default",
        "clamp_min.default",
        "clip.default",
        "cos.default",
        "cumsum.default",
        "div.Scalar",
        "einsum.default",
        "elu.default",
        "embedding.default",
        "eq.Scalar",
        "erf.default",
        "exp.default",
        "floor_divide.default",
        "full.default",
        "full_like.default",
        "gather.default",
        "ge.Scalar",
        "gelu.default",
        "glu.default",
        "group_norm.default",
        "gt.Scalar",
        "hardsigmoid.default",
        "hardswish.default",
        "hardtanh.default",
        "index.Tensor",
        "index_select.default",
        "instance_norm.default",
        "layer_norm.default",
        "le.Scalar",
        "leaky_relu.default",
        "linalg_vector_norm.default",
        "log.default",
        "log1p.default",
        "log_sigmoid.default",
        "log_softmax.int",
        "bitwise_not.default",
        "logical_not.default",
        "logsumexp.default",
        "lt.Scalar",
        "masked_fill.Scalar",
        "max.other",
        "maximum.default",
        "min.other",
        "minimum.default",
        "mish.default",
        "mul.Scalar",
        "native_layer_norm.default",
        "neg.default",
        "new_ones.default",
        "new_zeros.default",
        "ones.default",
        "ones_like.default",
        "pow.Tensor_Scalar",
        "prelu.default",
        "reciprocal.default",
        "relu.default",
        "relu6.default",
        "remainder.Scalar",
        "rms_norm.default",
        "rsqrt.default",
        "rsub.Scalar",
        "scalar_tensor.default",
        "selu.default",
        "sigmoid.default",
        "sign.default",
        "silu.default",
        "sin.default",
        "softplus.default",
        "sqrt.default",
        "square.default",
        "slice_scatter.default",
        "std.correction",
        "std.dim",
        "sub.Scalar",
        "sym_size.int",
        "tanh.default",
        "threshold.default",
        "to.dtype",
        "tril.default",
        "triu.default",
        "type_as.default",
        "unfold.default",
        "upsample_bicubic2d.vec",
        "upsample_bilinear2d.vec",
        "upsample_linear1d.vec",
        "upsample_trilinear3d.vec",
        "var.correction",
        "var.dim",
        "var_mean.correction",
        "var_mean.dim",
        "where.self",
        "zeros.default",
        "zeros_like.default",
    ]
)

_PYTHON: dict[str, Callable[..., Any]] = {
    "getitem": operator.getitem,
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "floordiv": operator.floordiv,
    "truediv": operator.truediv,
    "mod": operator.mod,
    "neg": operator.neg,
    "gdfq.fake_quantize": grid.fake_quantize,
    "gdfq.dequantize": grid.dequantize,
    "gdfq.dequantize_bias": grid.dequantize_bias,
}
_PYTHON_NAMES = {function: name for name, function in _PYTHON.items()}

ALLOWED = frozenset(
    {*WEIGHTED, *INTEGER_CONSUMERS, *GRID_PRESERVING, *SOFTMAX, *_OTHERS, BATCH_NORM, *_PYTHON}
)


def name_of(node: fx.Node) -> str:
    """The name of the operator that a call node calls ("" for nodes that call none)."""
    if node.op != "call_function":
        return ""
    target: Any = node.target
    return _PYTHON_NAMES.get(target) or str(target)


def resolve(name: str) -> Callable[..., Any]:
    """The function behind an allowed operator's name. Raises KeyError for any other name."""
    if name not in ALLOWED:
        raise KeyError(name)
    if name in _PYTHON:
        return _PYTHON[name]
    _, packet, overload = name.split(".")
    function: Callable[..., Any] = getattr(getattr(torch.ops.aten, packet), overload)
    return function


def has_weight(node: fx.Node) -> bool:
    """Whether the node is a convolution or linear layer with a weight of its own."""
    return name_of(node) in WEIGHTED and node.args[1].op == "get_attr"  # type: ignore[union-attr]


def layer_name(node: fx.Node) -> str:
    """The name of the module a layer's weight belongs to, `layer1.0.conv1`.

    Of a module that holds several weights, as attention does, with which of them: `in_proj`.
    """
    weight: Any = node.args[1]
    path, _, leaf = str(weight.target).rpartition(".")
    which = re.sub(r"_?weight_*$", "", re.sub(r"^(folded_)+", "", leaf))
    return ".".join(filter(None, (path, which))) or leaf


def outputs(graph: fx.Graph) -> list[fx.Node]:
    """The nodes whose values a graph returns, in order; what is returned twice is there twice."""
    (output,) = graph.find_nodes(op="output")
    returned: Any = output.args[0]
    return list(returned) if isinstance(returned, tuple | list) else [returned]


def numbers_per_image(node: fx.Node) -> int:
    """How many numbers a tensor holds for one image, wherever its batch dimension has gone."""
    (images,) = node.graph.find_nodes(op="placeholder")
    count = math.prod(map(int, node.meta["val"].shape))
    return count // int(images.meta["val"].shape[0])


def is_activation(node: fx.Node) -> bool:
    """Whether the node is a floating-point tensor that depends on the input."""
    value = node.meta.get("val")
    return node.op != "get_attr" and isinstance(value, torch.Tensor) and value.is_floating_point()


def depends_on_images(node: fx.Node) -> bool:
    """Whether the node is a tensor of any kind that depends on the input."""
    return node.op not in {"get_attr", "output"} and isinstance(node.meta.get("val"), torch.Tensor)


def is_batch_size(node: fx.Node) -> bool:
    """Whether the node is the number of images."""
    return name_of(node) == "aten.sym_size.int" and bool(node.args[1] == 0)


def has_channels_second(node: fx.Node) -> bool:
    """Whether a layer's output channels are dimension 1, as those of a batch norm behind it are.

    A linear layer's are the last dimension: they differ on inputs of three dimensions and more.
    """
    return name_of(node) not in LINEARS or node.meta["val"].ndim == 2


def channel_dim(layer: fx.Node) -> int:
    """The dimension of a layer's output that holds its channels."""
    return -1 if name_of(layer) in LINEARS else 1


def weight_layout(node: fx.Node) -> tuple[grid.Layout, int]:
    """Where a layer's weight keeps its output channels, and the number of its groups."""
    if name_of(node) in TRANSPOSED_CONVOLUTIONS:
        groups = node.args[6] if len(node.args) > 6 else node.kwargs.get("groups", 1)
        assert isinstance(groups, int)
        return grid.Layout.TRANSPOSED, groups
    return grid.Layout.ROWS, 1


_CLAMPS = frozenset(f"aten.{name}.default" for name in ("hardtanh", "clamp", "clamp_min", "clip"))


def is_rectifier(node: fx.Node) -> bool:
    """Whether the node is a ReLU or a ReLU with a ceiling (ReLU6, hardtanh or clamp from 0)."""
    name = name_of(node)
    if name in {"aten.relu.default", "aten.relu6.default"}:
        return True
    if name in _CLAMPS:
        low = node.args[1] if len(node.args) > 1 else node.kwargs.get("min")
        return isinstance(low, int | float) and low == 0
    return False


def keeps_grid(node: fx.Node) -> bool:
    """Whether the node only moves numbers: its output lies on the grid of its (first) input."""
    name = name_of(node)
    if name == "getitem":  # one of several outputs
        return keeps_grid(node.all_input_nodes[0])
    if name in {"aten.pad.default", "aten.constant_pad_nd.default"}:
        # A pad value other than 0 need not lie on the grid.
        values = [a for a in (*node.args[2:], *node.kwargs.values()) if isinstance(a, int | float)]
        return all(value == 0 for value in values)
    return name in GRID_PRESERVING


def grid_source(node: fx.Node) -> fx.Node:
    """The node whose numbers the given node merely moves; not a constant, which has no grid."""
    while keeps_grid(node):
        (source, *_) = node.all_input_nodes
        if source.op == "get_attr":
            break
        node = source
    return node
