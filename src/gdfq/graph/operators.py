"""The operators that a network may consist of, and how quantizers treat each of them.

This module has names and sets of names; `gdfq.graph.queries` has the questions about nodes. No
other module contains the name of an operator. A captured or stored graph may call nothing else: the
safety of the file format rests on it (`gdfq.deploy.graph_json`).
"""

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from gdfq.functional import float_grid, grid, reassembly, rotations

CONVOLUTIONS = frozenset(
    f"aten.conv{d}d.{form}" for d in (1, 2, 3) for form in ("default", "padding")
)
PADDED_CONVOLUTIONS = frozenset(f"aten.conv{d}d.default" for d in (1, 2, 3))
"""Convolutions whose padding is given in numbers."""
CONVOLUTIONS_2D = frozenset(f"aten.conv2d.{form}" for form in ("default", "padding"))
TRANSPOSED_CONVOLUTIONS = frozenset(
    {"aten.conv_transpose1d.default", "aten.conv_transpose2d.input", "aten.conv_transpose3d.input"}
)
OF_VOLUMES = frozenset(name for name in CONVOLUTIONS | TRANSPOSED_CONVOLUTIONS if "3d" in name)
"""Convolutions of three dimensions."""
LINEAR = "aten.linear.default"
LINEARS = frozenset({LINEAR})
WEIGHTED = CONVOLUTIONS | TRANSPOSED_CONVOLUTIONS | LINEARS
"""Operators (input, weight, bias, ...) whose weight is quantized."""

BATCH_NORM = "aten.batch_norm.default"
GROUP_NORM = "aten.group_norm.default"
"""(input, groups, weight, bias, eps)."""
BATCH_STATISTICS_NORMS = frozenset(
    f"aten._native_batch_norm_legit{form}"
    for form in (".no_stats", ".default", "_functional.default")
)
"""Batch norms of the batch's own statistics: (input, weight, bias, ..., momentum, eps)."""
INFERENCE_BATCH_NORM = "aten._native_batch_norm_legit_no_training.default"
"""How `torch.export` may write a batch norm in evaluation mode."""

FAKE_QUANTIZE = "gdfq.fake_quantize"
"""(x, scale, zero point, bits): rounds an activation to its grid."""
DEQUANTIZE = "gdfq.dequantize"
"""(codes, scale, zero point, bits): the weight that codes stand for."""
DEQUANTIZE_BIAS = "gdfq.dequantize_bias"
"""(codes, scale of the input, scale of the weight): the bias that codes stand for."""
FAKE_QUANTIZE_FLOAT = "gdfq.fake_quantize_float"
"""(x, scale, name of the format): rounds an activation to its floating-point grid."""
DEQUANTIZE_FLOAT = "gdfq.dequantize_float"
"""(codes, scale, name of the format): the weight that codes of a floating-point grid stand for."""
FAKE_QUANTIZE_TOKENS = "gdfq.fake_quantize_tokens"
"""(x, bits): rounds an activation with a scale for each token, which is found on the way."""
ROTATED = "gdfq.rotated"
"""(x, A, B): x (A ⊗ B), a rotation of the channels of each token."""
REASSEMBLED = "gdfq.reassembled"
"""(x, first, second, shares): channels that are split and merged."""
ROUNDING = frozenset({FAKE_QUANTIZE, FAKE_QUANTIZE_FLOAT})
"""What rounds an activation to a grid that is stored."""
ALL_ROUNDING = ROUNDING | {FAKE_QUANTIZE_TOKENS}
WEIGHT_CODES = frozenset({DEQUANTIZE, DEQUANTIZE_FLOAT})
"""What makes a weight of its codes."""
QUANTIZATION = ALL_ROUNDING | WEIGHT_CODES | {DEQUANTIZE_BIAS}

BATCH_SIZE = "aten.sym_size.int"
GETITEM = "getitem"
RESHAPE = "aten.reshape.default"
FULL = "aten.full.default"
FULL_LIKE = "aten.full_like.default"
ZEROS_LIKE = "aten.zeros_like.default"
TRANSPOSE = "aten.t.default"
SWAP, PERMUTE = "aten.transpose.int", "aten.permute.default"
EXPAND, UNSQUEEZE = "aten.expand.default", "aten.unsqueeze.default"
ADD = "aten.add.Tensor"
CONCATENATE = "aten.cat.default"
MASKED_FILL = "aten.masked_fill.Scalar"
MASKED_FILL_TENSOR, WHERE = "aten.masked_fill.Tensor", "aten.where.self"
ZERO = "aten.zero.default"
INDEX_SELECT = "aten.index_select.default"
EMPTY, NEW_EMPTY = "aten.empty.memory_format", "aten.new_empty.default"
EMPTY_LIKE = "aten.empty_like.default"
FILL = frozenset({"aten.fill.Tensor", "aten.fill.Scalar"})
"""(x, value): a tensor of the shape of x."""
COPY = "aten.copy.default"
"""(x, y): y in the shape and type of x."""
WRITE = "aten.copy_.default"
"""(x, y): how an exported graph updates a buffer x at its end."""
SLICE, SLICE_SCATTER = "aten.slice.Tensor", "aten.slice_scatter.default"
SELECT_SCATTER, INDEX_PUT = "aten.select_scatter.default", "aten.index_put.default"
CAST = "aten._to_copy.default"
CASTS = frozenset({CAST, "aten.to.dtype"})
TYPED_LIKE = frozenset({"aten.type_as.default", "aten.to.other"})
"""(x, y): x in the type of y."""
SQUEEZE_DIMS = "aten.squeeze.dims"
SQUEEZES = frozenset({"aten.squeeze.default", "aten.squeeze.dim", SQUEEZE_DIMS})
"""(x, dimension or dimensions, or none for all)."""
ATTENTION = "aten.scaled_dot_product_attention.default"

LSTM_CELL, GRU_CELL = "aten.lstm_cell.default", "aten.gru_cell.default"
RNN_TANH_CELL, RNN_RELU_CELL = "aten.rnn_tanh_cell.default", "aten.rnn_relu_cell.default"
COSINE_SIMILARITY = "aten.cosine_similarity.default"
RRELU = "aten.rrelu.default"
RECURRENT = frozenset(f"aten.{name}.input" for name in ("gru", "lstm", "rnn_relu", "rnn_tanh"))
"""Layers that read a sequence: (input, state or states, weights, ...). They stay float."""

RELU = "aten.relu.default"
RELU6 = "aten.relu6.default"
HARDTANH = "aten.hardtanh.default"
RECTIFIERS = frozenset({RELU, RELU6})
CLAMP, CLAMP_MIN, CLAMP_MAX = (f"aten.clamp{end}.default" for end in ("", "_min", "_max"))
CLAMPS = frozenset({CLAMP, CLAMP_MIN, CLAMP_MAX, "aten.clip.default", HARDTANH})
"""Operators (input, low, high) that are rectifiers with a low of 0; one has a high alone."""
MINIMUM, MAXIMUM = "aten.minimum.default", "aten.maximum.default"
EXTREMES = frozenset({MINIMUM, MAXIMUM})
CLAMPS_BY_TENSORS = EXTREMES | {"aten.clamp.Tensor", "aten.clip.Tensor"}
"""Clamps whose bounds are tensors; capture writes bounds of one number as such."""
OPEN_CLAMPS = RECTIFIERS | {HARDTANH}
"""Clamps that pass gradients strictly inside their ends; `aten.clamp` passes them at its ends."""
PADS = frozenset({"aten.pad.default", "aten.constant_pad_nd.default"})
VIEWS = frozenset({"aten.view.default", "aten._unsafe_view.default"})
RESHAPES = frozenset({"aten.flatten.using_ints", RESHAPE})
MEAN = "aten.mean.dim"
MEANS = frozenset({MEAN, "aten.sum.dim_IntList"})
"""Means and sums (input, dimensions)."""
SCALE_EQUIVARIANT = frozenset(
    f"aten.{name}.default" for name in ("relu", "leaky_relu", "clone", "contiguous")
)
"""Operators f with f(s x) = s f(x) for each number x and s > 0."""
WINDOW_POOLING: Mapping[str, int] = {
    f"aten.{kind}pool{d}d.default": d
    for kind in ("avg_", "adaptive_avg_", "max_")
    for d in (1, 2, 3)
}
"""Poolings, with the number of their spatial dimensions."""
AVERAGE_POOLING: Mapping[int, str] = {d: f"aten.avg_pool{d}d.default" for d in (1, 2, 3)}
ADAPTIVE_AVERAGE_POOLING: Mapping[int, str] = {
    d: f"aten.adaptive_avg_pool{d}d.default" for d in (1, 2, 3)
}
ADAPTIVE_MAX_POOLING: Mapping[int, str] = {
    d: f"aten.adaptive_max_pool{d}d.default" for d in (1, 2, 3)
}
NEAREST_UPSAMPLING: Mapping[int, str] = {d: f"aten.upsample_nearest{d}d.vec" for d in (1, 2, 3)}
"""Operators by the number of their spatial dimensions."""
IDENTITIES = frozenset(
    {
        "aten.alias.default",
        "aten.detach.default",
        "aten.dropout.default",  # captured in evaluation mode
        "aten.feature_dropout.default",
        "aten.alpha_dropout.default",
        "aten.lift_fresh_copy.default",
        "aten.lift_fresh.default",
        "aten.contiguous.default",
    }
)
FILLS: Mapping[str, int | None] = {
    "aten.new_zeros.default": 0,
    "aten.zeros_like.default": 0,
    "aten.new_ones.default": 1,
    "aten.ones_like.default": 1,
    "aten.new_full.default": None,
    "aten.full_like.default": None,
}
"""Operators that make a tensor of one number, which is their last argument where None is here."""
CREATIONS = frozenset(
    f"aten.{name}.default" for name in ("arange", "full", "ones", "scalar_tensor", "zeros")
) | {"aten.arange.start"}
"""Operators that make a tensor of no other tensor."""
LIKE_INPUT: Mapping[str, str] = {
    "aten.full.default": "aten.new_full.default",
    "aten.ones.default": "aten.new_ones.default",
    "aten.zeros.default": "aten.new_zeros.default",
}
"""Operators of `CREATIONS`, with those that take the device from a tensor."""
NEW = frozenset(LIKE_INPUT.values())
"""Operators (x, size, ...) that take only the device from x."""
ARANGE, ARANGE_FROM = "aten.arange.default", "aten.arange.start"
NEW_ONES, CUMSUM = "aten.new_ones.default", "aten.cumsum.default"
POWER, POWER_OF_TENSOR = "aten.pow.Tensor_Scalar", "aten.pow.Tensor_Tensor"
POWERS = frozenset({POWER, POWER_OF_TENSOR})
ADD_NUMBER = "aten.add.Scalar"
SUBTRACT = "sub"
"""Of sizes."""
COPIES = IDENTITIES | {"aten.clone.default"}
"""Operators that return their input, or a copy of it."""
MATRIX_PRODUCTS = frozenset({"aten.matmul.default", "aten.mm.default"})
ADDMM = "aten.addmm.default"
"""(bias, x, weight)."""

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

SEVERAL_OUTPUTS = frozenset(
    f"aten.{name}"
    for name in (
        "adaptive_max_pool2d.default",
        "chunk.default",
        "max.dim",
        "min.dim",
        "split.Tensor",
        "split_with_sizes.default",
        "unbind.int",
    )
)

UNBIND = "aten.unbind.int"
DIVISIONS = frozenset(
    {UNBIND, *(f"aten.{n}" for n in ("chunk.default", "split.Tensor", "split_with_sizes.default"))}
)
"""Operators that divide a tensor into several along a dimension."""
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
EMBEDDING, RMS_NORM = "aten.embedding.default", "aten.rms_norm.default"
MATRIX_PRODUCT = "aten.matmul.default"
RECIPROCAL_ROOT = "aten.rsqrt.default"
ELEMENTWISE_PRODUCTS = frozenset({"aten.mul.Tensor"})
DIFFERENCE = "aten.sub.Tensor"
SUMS = frozenset({ADD, DIFFERENCE})
SUMS_WITH_NUMBERS = frozenset({ADD, ADD_NUMBER})
SOFTMAX_OPERATOR = "aten.softmax.int"
SOFTMAX = frozenset({SOFTMAX_OPERATOR})
LOG_SOFTMAX = frozenset({"aten.log_softmax.int"})
SIGMOIDS = frozenset(f"aten.{name}.default" for name in ("sigmoid", "log_sigmoid", "hardsigmoid"))
LOGARITHM, EXPONENTIAL = "aten.log.default", "aten.exp.default"
MULTIPLY, DIVIDE = "aten.mul.Tensor", "aten.div.Tensor"
PRELU = "aten.prelu.default"
"""(x, slopes): one slope, or one for each channel."""
_UNTAGGED_POINTWISE = {PRELU} | frozenset(
    f"aten.{name}"
    for name in (
        *("hardswish.default", "log_sigmoid.default", "floor_divide.default"),
        *("where.Scalar", "where.ScalarOther", "where.ScalarSelf"),
    )
)
"""Operators that compute each number of their result from one of each tensor, and that PyTorch does
not mark as such."""
MOVES = frozenset(
    f"aten.{name}"
    for name in (
        *("clone.default", "contiguous.default", "flatten.using_ints", "movedim.int"),
        *("permute.default", "reshape.default", "squeeze.default", "squeeze.dim"),
        *("squeeze.dims", "t.default", "transpose.int", "unflatten.int", "unsqueeze.default"),
    )
)
"""Operators that return all numbers of their one tensor, in another shape or order."""
OTHER_MOVES = frozenset({"aten.movedim.int", "aten.t.default"})
"""Those of `MOVES` that change the order of dimensions, beside `SWAP` and `PERMUTE`."""
OF_CONSTANT_GRADIENT = MOVES | SUMS | JOINS | {GETITEM}
"""Operators whose gradient depends on no tensor."""
REPEATED_MOVES = MOVES | {"aten.expand.default"}
"""Operators that return numbers of their one tensor, also several times."""
_CLAMPS = CLAMPS - {HARDTANH}
SCALINGS = frozenset({MULTIPLY, DIVIDE, "aten.mul.Scalar", "aten.div.Scalar"})
WITH_NUMBERS = SCALINGS | {ADD, "aten.add.Scalar"}
"""Operators of an end if their second argument is a number."""
END = MOVES | SOFTMAX | LOG_SOFTMAX | SIGMOIDS | _CLAMPS | {LOGARITHM, EXPONENTIAL} | WITH_NUMBERS
"""Operators of a network's end, from logits to the probabilities that it returns."""
NORM, VECTOR_NORM = "aten.linalg_norm.default", "aten.linalg_vector_norm.default"
"""(x, order, dimensions, keepdim); the first also computes norms of matrices."""
SUM, SQUARE = "aten.sum.dim_IntList", "aten.square.default"
OF_NORMS = (
    MOVES
    | _CLAMPS
    | {SUM, ADD, "aten.add.Scalar", "aten.expand.default", "aten.pow.Tensor_Scalar"}
    | {f"aten.{name}.default" for name in ("sqrt", "rsqrt", "reciprocal")}
)
"""Operators between a vector and the norm that it is divided by."""
SPELLINGS: Mapping[str, str] = {
    "aten.special_expit.default": "aten.sigmoid.default",
    "aten.special_softmax.default": "aten.softmax.int",
    "aten.special_log_softmax.default": "aten.log_softmax.int",
}
"""Operators with the same arguments as another one, which capture writes instead."""

AFFINE = frozenset({ADD, DIFFERENCE, MULTIPLY, DIVIDE})
ADDCMUL = "aten.addcmul.default"
"""(t, x, y): t + x y."""
ANTIALIASED = frozenset({"aten._upsample_bicubic2d_aa.vec", "aten._upsample_bilinear2d_aa.vec"})
"""Resizing that weighs all pixels that a new one covers."""
VARIANCES = frozenset(
    f"aten.{name}.{form}" for name in ("std", "var", "var_mean") for form in ("correction", "dim")
)
"""Variances and standard deviations over dimensions."""
SQUARE_ROOT = "aten.sqrt.default"
ROOTS = frozenset({"aten.rsqrt.default", SQUARE_ROOT, POWER})
"""Operators that make a standard deviation of a variance."""

INTEGER_CONSUMERS = WEIGHTED | POOLING | MERGING | MAX_POOLING
"""Operators that an integer runtime computes from quantized inputs: the `full` placement."""

_OTHERS = frozenset(
    f"aten.{name}"
    for name in [
        "_to_copy.default",
        "_upsample_bicubic2d_aa.vec",
        "_upsample_bilinear2d_aa.vec",
        "_upsample_nearest_exact1d.vec",
        "_upsample_nearest_exact2d.vec",
        "abs.default",
        "adaptive_max_pool1d.default",
        "adaptive_max_pool3d.default",
        "add.Scalar",
        "addcmul.default",
        "affine_grid_generator.default",
        "arange.default",
        "arange.start",
        "baddbmm.default",
        "bitwise_not.default",
        "broadcast_to.default",
        "celu.default",
        "clamp.default",
        "clamp_max.default",
        "clamp_min.default",
        "clip.default",
        "col2im.default",
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
        "grid_sampler.default",
        "group_norm.default",
        "gt.Scalar",
        "hardsigmoid.default",
        "hardswish.default",
        "hardtanh.default",
        "im2col.default",
        "index.Tensor",
        "index_put.default",
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
        "logical_not.default",
        "logsumexp.default",
        "lt.Scalar",
        "masked_fill.Scalar",
        "max.other",
        "max_pool2d_with_indices.default",
        "max_unpool2d.default",
        "maximum.default",
        "min.other",
        "minimum.default",
        "mish.default",
        "mul.Scalar",
        "native_layer_norm.default",
        "neg.default",
        "new_full.default",
        "new_ones.default",
        "new_zeros.default",
        "ones.default",
        "ones_like.default",
        "pow.Scalar",
        "pow.Tensor_Scalar",
        "pow.Tensor_Tensor",
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
        "slice_scatter.default",
        "softplus.default",
        "sqrt.default",
        "square.default",
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
        "where.Scalar",
        "where.ScalarOther",
        "where.ScalarSelf",
        "where.self",
        "zeros.default",
        "zeros_like.default",
    ]
)

_PYTHON: dict[str, Callable[..., Any]] = {
    GETITEM: operator.getitem,
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "floordiv": operator.floordiv,
    "truediv": operator.truediv,
    "mod": operator.mod,
    "neg": operator.neg,
    FAKE_QUANTIZE: grid.fake_quantize,
    FAKE_QUANTIZE_TOKENS: grid.fake_quantize_tokens,
    ROTATED: rotations.rotated,
    REASSEMBLED: reassembly.reassembled,
    DEQUANTIZE: grid.dequantize,
    DEQUANTIZE_BIAS: grid.dequantize_bias,
    FAKE_QUANTIZE_FLOAT: float_grid.fake_quantize_float,
    DEQUANTIZE_FLOAT: float_grid.dequantize_float,
}
_PYTHON_NAMES = {function: name for name, function in _PYTHON.items()}

ALLOWED = frozenset(
    {
        *WEIGHTED,
        *INTEGER_CONSUMERS,
        *GRID_PRESERVING,
        *SOFTMAX,
        *RECURRENT,
        *_OTHERS,
        BATCH_NORM,
        *_PYTHON,
    }
)


def name_of(node: fx.Node) -> str:
    """Return the name of the operator that a node calls ("" for nodes that call none)."""
    if node.op != "call_function":
        return ""
    target: Any = node.target
    return _PYTHON_NAMES.get(target) or str(target)


def is_pointwise(node: fx.Node) -> bool:
    """Return whether an operator computes each number from one number of each of its tensors."""
    tags: Any = getattr(node.target, "tags", ())
    return torch.Tag.pointwise in tags or name_of(node) in _UNTAGGED_POINTWISE


def function_of(name: str) -> Callable[..., Any]:
    """Return the function of any operator, as `name_of` writes it."""
    return _PYTHON.get(name) or aten_function(name)


def resolve(name: str) -> Callable[..., Any]:
    """Return the function of an allowed operator.

    Raises:
        KeyError: The operator is not allowed.
    """
    if name not in ALLOWED:
        raise KeyError(name)
    return function_of(name)


def aten_function(name: str) -> Any:
    """Return PyTorch's operator of a name, such as `torch.ops.aten.relu.default`."""
    _, packet, overload = name.split(".")
    return getattr(getattr(torch.ops.aten, packet), overload)


def short_name(node: fx.Node) -> str:
    """Return the name of a node's operator without its package and overload: `conv2d`, or ""."""
    _, *packet = name_of(node).split(".")
    return packet[0] if packet else ""
