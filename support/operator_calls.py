"""A call of each operator that a network may consist of, on a tensor [N, 4, 6, 6]."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

A: Any = torch.ops.aten
Call = Callable[[Tensor], Tensor]


def _in_dimensions(dimensions: int) -> Mapping[str, Call]:
    """Operators that exist for 1, 2 and 3 dimensions."""
    d = dimensions
    channels = 1 if d == 3 else 4

    def shaped(x: Tensor) -> Tensor:
        return (x.flatten(2), x, x[:, None])[d - 1]

    def weight(*shape: int) -> Tensor:
        return torch.linspace(-1, 1, 3**d).view(*[3] * d).expand(*shape, *[3] * d).contiguous()

    transposed = f"aten.conv_transpose{d}d.{'default' if d == 1 else 'input'}"
    calls: dict[str, Call] = {
        f"aten.adaptive_avg_pool{d}d.default": lambda x: getattr(A, f"adaptive_avg_pool{d}d")(shaped(x), [3, 5, 4][-d:]),
        f"aten.adaptive_max_pool{d}d.default": lambda x: getattr(A, f"adaptive_max_pool{d}d")(shaped(x), [3, 5, 4][-d:])[0],
        f"aten.avg_pool{d}d.default": lambda x: getattr(A, f"avg_pool{d}d")(shaped(x), [2] * d),
        f"aten.max_pool{d}d.default": lambda x: getattr(A, f"max_pool{d}d")(shaped(x), [2] * d),
        f"aten.conv{d}d.default": lambda x: getattr(F, f"conv{d}d")(shaped(x), weight(5, channels)),
        f"aten.conv{d}d.padding": lambda x: getattr(F, f"conv{d}d")(shaped(x), weight(5, channels), padding="same"),
        transposed: lambda x: getattr(F, f"conv_transpose{d}d")(shaped(x), weight(channels, 5), stride=2),
        f"aten.upsample_nearest{d}d.vec": lambda x: F.interpolate(shaped(x), size=[5, 7, 8][-d:] if d > 1 else 50),
    }  # fmt: skip
    return calls


def _recurrent(name: str, gates: int, x: Tensor) -> Tensor:
    """One recurrent layer of 5 units over 6 steps of 6 numbers."""
    weights = [torch.linspace(-1, 1, gates * 5 * n).view(gates * 5, n) for n in (6, 5)]
    parameters = [*weights, *(torch.linspace(-0.5, 0.5, gates * 5) for _ in range(2))]
    start = x.new_zeros(1, x.shape[0], 5)
    state = [start, start] if name == "lstm" else start
    options = (parameters, True, 1, 0.0, False, False, True)
    output: Tensor = getattr(torch._VF, name)(x[:, 0], state, *options)[0]
    return output


CALLS: Mapping[str, Call] = {
    **_in_dimensions(1), **_in_dimensions(2), **_in_dimensions(3),
    "aten._upsample_bicubic2d_aa.vec": lambda x: F.interpolate(x, size=(4, 9), mode="bicubic", antialias=True),
    "aten._upsample_bilinear2d_aa.vec": lambda x: F.interpolate(x, size=(4, 9), mode="bilinear", antialias=True),
    "aten._upsample_nearest_exact1d.vec": lambda x: F.interpolate(x.flatten(2), size=50, mode="nearest-exact"),
    "aten._upsample_nearest_exact2d.vec": lambda x: F.interpolate(x, size=(7, 8), mode="nearest-exact"),
    "aten._to_copy.default": lambda x: A._to_copy(x > 0, dtype=torch.float32),
    "aten.add.Scalar": lambda x: A.add.Scalar(x, 2),
    "aten.add.Tensor": lambda x: x + x,
    "aten.addcmul.default": lambda x: A.addcmul(x, x, x, value=0.5),
    "aten.affine_grid_generator.default": lambda x: F.affine_grid(x[:, 0, :2, :3], [x.shape[0], 4, 5, 3], False),
    "aten.amax.default": lambda x: A.amax(x, [1]),
    "aten.amin.default": lambda x: A.amin(x, [1]),
    "aten.arange.default": lambda x: x + torch.arange(x.shape[0])[:, None, None, None],
    "aten.arange.start": lambda x: x + torch.arange(1, x.shape[0] + 1)[:, None, None, None],
    "aten.baddbmm.default": lambda x: A.baddbmm(x[:, 0], x[:, 0], x[:, 1], beta=0.5, alpha=2),
    "aten.batch_norm.default": lambda x: F.batch_norm(x, torch.zeros(4), torch.ones(4)),
    "aten.bitwise_not.default": lambda x: A.bitwise_not(x > 0).float(),
    "aten.bmm.default": lambda x: A.bmm(x[:, 0], x[:, 1]),
    "aten.broadcast_to.default": lambda x: A.broadcast_to(x[:, :1], [x.shape[0], 4, 6, 6]),
    "aten.cat.default": lambda x: torch.cat([x, x], 1),
    "aten.channel_shuffle.default": lambda x: A.channel_shuffle(x, 2),
    "aten.chunk.default": lambda x: A.chunk(x, 3, 1)[1],
    "aten.clamp.default": lambda x: A.clamp(x, -1, 1),
    "aten.clamp_max.default": lambda x: A.clamp_max(x, 1),
    "aten.clamp_min.default": lambda x: A.clamp_min(x, 0),
    "aten.clip.default": lambda x: A.clip(x, -1, 1),
    "aten.col2im.default": lambda x: A.col2im(x.reshape(-1, 16, 9), [6, 6], [2, 2], [1, 1], [0, 0], [2, 2]),
    "aten.constant_pad_nd.default": lambda x: A.constant_pad_nd(x, [1, 1, -1, 2], 0.5),
    "aten.contiguous.default": lambda x: A.contiguous(x) + 1,
    "aten.cumsum.default": lambda x: A.cumsum(x, 2),
    "aten.div.Scalar": lambda x: A.div.Scalar(x, 2),
    "aten.div.Tensor": lambda x: x / (x.square() + 1),
    "aten.einsum.default": lambda x: torch.einsum("bchw,bdhw->bcd", x, x),
    "aten.embedding.default": lambda x: A.embedding(torch.arange(27.0).view(9, 3), (x > 0).long()),
    "aten.eq.Scalar": lambda x: (x == 1).float(),
    "aten.expand.default": lambda x: A.expand(x[:, :1], [-1, 4, 6, 6]),
    "aten.flatten.using_ints": lambda x: A.flatten(x, 1),
    "aten.flip.default": lambda x: A.flip(x, [2, 3]),
    "aten.floor_divide.default": lambda x: A.floor_divide(x, 0.3),
    "aten.full.default": lambda x: x + torch.full([x.shape[0], 1, 1, 1], 2.0),
    "aten.full_like.default": lambda x: x + A.full_like(x, 2),
    "aten.gather.default": lambda x: A.gather(x, 1, (x > 0).long()),
    "aten.ge.Scalar": lambda x: (x >= 1).float(),
    "aten.glu.default": lambda x: A.glu(x, 1),
    "aten.grid_sampler.default": lambda x: F.grid_sample(x, x[:, :2].permute(0, 2, 3, 1).tanh(), align_corners=False),
    "aten.group_norm.default": lambda x: F.group_norm(x, 2),
    "aten.gru.input": lambda x: _recurrent("gru", 3, x),
    "aten.gt.Scalar": lambda x: (x > 1).float(),
    "aten.hardtanh.default": lambda x: A.hardtanh(x, 0, 3),
    "aten.im2col.default": lambda x: A.im2col(x, [2, 3], [1, 2], [1, 1], [2, 1]),
    "aten.index.Tensor": lambda x: x[:, :, torch.tensor([0, 1]), torch.tensor([2, 3])],
    "aten.index_put.default": lambda x: A.index_put(x, [None, torch.tensor([2, 0])], torch.tensor(1.5)),
    "aten.index_select.default": lambda x: A.index_select(x, 1, torch.tensor([2, 0])),
    "aten.instance_norm.default": lambda x: F.instance_norm(x),
    "aten.layer_norm.default": lambda x: F.layer_norm(x, [6]),
    "aten.le.Scalar": lambda x: (x <= 1).float(),
    "aten.leaky_relu.default": lambda x: A.leaky_relu(x, 0.1),
    "aten.linalg_vector_norm.default": lambda x: A.linalg_vector_norm(x, 3, [1]),
    "aten.linear.default": lambda x: F.linear(x, torch.arange(30.0).view(5, 6)),
    "aten.log.default": lambda x: x.abs().log(),
    "aten.log1p.default": lambda x: x.abs().log1p(),
    "aten.log_softmax.int": lambda x: x.log_softmax(1),
    "aten.logical_not.default": lambda x: A.logical_not(x > 0).float(),
    "aten.logsumexp.default": lambda x: A.logsumexp(x, [1]),
    "aten.lt.Scalar": lambda x: (x < 1).float(),
    "aten.lstm.input": lambda x: _recurrent("lstm", 4, x),
    "aten.masked_fill.Scalar": lambda x: x.masked_fill(x > 1, 0),
    "aten.matmul.default": lambda x: x @ x,
    "aten.max.dim": lambda x: x.max(1)[0],
    "aten.max_pool2d_with_indices.default": lambda x: A.max_pool2d_with_indices(x, [2, 2])[0],
    "aten.max_unpool2d.default": lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), [2, 2]),
    "aten.max.other": lambda x: torch.max(x, -x),
    "aten.maximum.default": lambda x: A.maximum(x, -x),
    "aten.mean.default": lambda x: x - A.mean(x),
    "aten.mean.dim": lambda x: x.mean(1),
    "aten.min.dim": lambda x: x.min(1)[0],
    "aten.min.other": lambda x: torch.min(x, -x),
    "aten.minimum.default": lambda x: A.minimum(x, -x),
    "aten.movedim.int": lambda x: A.movedim(x, 1, 3),
    "aten.mul.Scalar": lambda x: A.mul.Scalar(x, 2),
    "aten.mul.Tensor": lambda x: x * x,
    "aten.native_layer_norm.default": lambda x: A.native_layer_norm(x, [6], None, None, 1e-5)[0],
    "aten.new_full.default": lambda x: x + A.new_full(x, [4, 1, 1], 3.0),
    "aten.new_ones.default": lambda x: x + A.new_ones(x, [4, 1, 1]),
    "aten.new_zeros.default": lambda x: x + A.new_zeros(x, [4, 1, 1]),
    "aten.ones.default": lambda x: x + torch.ones(x.shape[0], 1, 1, 1),
    "aten.ones_like.default": lambda x: x + A.ones_like(x),
    "aten.pad.default": lambda x: A.pad(x, [1, 2, -1, 2], "reflect"),
    "aten.permute.default": lambda x: A.permute(x, [0, 2, 3, 1]),
    "aten.pixel_shuffle.default": lambda x: A.pixel_shuffle(x, 2),
    "aten.pixel_unshuffle.default": lambda x: A.pixel_unshuffle(x, 3),
    "aten.pow.Scalar": lambda x: 2.0**x,
    "aten.pow.Tensor_Tensor": lambda x: (x.abs() + 1) ** torch.linspace(-1, 2, 6),
    "aten.pow.Tensor_Scalar": lambda x: x.abs() ** 1.5,
    "aten.prelu.default": lambda x: A.prelu(x, torch.linspace(0.1, 0.4, 4)),
    "aten.reflection_pad2d.default": lambda x: A.reflection_pad2d(x, [1, 1, 2, 2]),
    "aten.remainder.Scalar": lambda x: A.remainder.Scalar(x, -0.7),
    "aten.repeat.default": lambda x: A.repeat(x, [1, 2, 1, 3]),
    "aten.replication_pad2d.default": lambda x: A.replication_pad2d(x, [1, 1, 2, 2]),
    "aten.reshape.default": lambda x: A.reshape(x, [-1, 24, 6]),
    "aten.rms_norm.default": lambda x: F.rms_norm(x, [6]),
    "aten.rnn_relu.input": lambda x: _recurrent("rnn_relu", 1, x),
    "aten.rnn_tanh.input": lambda x: _recurrent("rnn_tanh", 1, x),
    "aten.roll.default": lambda x: A.roll(x, [1, -2], [2, 3]),
    "aten.rsqrt.default": lambda x: x.abs().rsqrt(),
    "aten.rsub.Scalar": lambda x: A.rsub.Scalar(x, 2),
    "aten.scalar_tensor.default": lambda x: x + torch.scalar_tensor(2.0),
    "aten.select.int": lambda x: A.select(x, 1, 2),
    "aten.slice.Tensor": lambda x: x[:, 1:3, ::2],
    "aten.slice_scatter.default": lambda x: A.slice_scatter(x, x[:, 1:3] * 2, 1, 1, 3),
    "aten.softmax.int": lambda x: x.softmax(1),
    "aten.split.Tensor": lambda x: A.split(x, 2, 1)[1],
    "aten.split_with_sizes.default": lambda x: A.split_with_sizes(x, [1, 3], 1)[1],
    "aten.sqrt.default": lambda x: x.abs().sqrt(),
    "aten.squeeze.default": lambda x: A.squeeze(x[:, :1]).reshape(-1, 36),
    "aten.squeeze.dim": lambda x: A.squeeze(x[:, :1], 1),
    "aten.squeeze.dims": lambda x: A.squeeze(x[:, :1], [1]),
    "aten.stack.default": lambda x: torch.stack([x, x], 1),
    "aten.std.correction": lambda x: A.std.correction(x, [1], correction=1),
    "aten.std.dim": lambda x: A.std.dim(x, [1]),
    "aten.sub.Scalar": lambda x: A.sub.Scalar(x, 2),
    "aten.sub.Tensor": lambda x: x - x.square(),
    "aten.sum.dim_IntList": lambda x: x.sum(1),
    "aten.sym_size.int": lambda x: x.view(x.shape[0], -1),
    "aten.t.default": lambda x: x @ A.t(torch.arange(30.0).view(5, 6)),
    "aten.threshold.default": lambda x: A.threshold(x, 0.5, 0.1),
    "aten.to.dtype": lambda x: (x > 0).to(torch.float32),
    "aten.transpose.int": lambda x: A.transpose(x, 1, 2),
    "aten.tril.default": lambda x: x.tril(-1),
    "aten.triu.default": lambda x: x.triu(2),
    "aten.type_as.default": lambda x: A.type_as(x, x) + 1,
    "aten.unbind.int": lambda x: A.unbind(x, 1)[1],
    "aten.unflatten.int": lambda x: A.unflatten(x, 1, [2, 2]),
    "aten.unfold.default": lambda x: A.unfold(x, 2, 3, 1),
    "aten.unsqueeze.default": lambda x: A.unsqueeze(x, 1),
    "aten.upsample_bicubic2d.vec": lambda x: F.interpolate(x, size=(9, 11), mode="bicubic"),
    "aten.upsample_bilinear2d.vec": lambda x: F.interpolate(x, scale_factor=1.7, mode="bilinear"),
    "aten.upsample_linear1d.vec": lambda x: F.interpolate(x.flatten(2), size=50, mode="linear"),
    "aten.upsample_trilinear3d.vec": lambda x: F.interpolate(x[:, None], scale_factor=2, mode="trilinear"),
    "aten.var.correction": lambda x: A.var.correction(x, [1], correction=1),
    "aten.var.dim": lambda x: A.var.dim(x, [1]),
    "aten.var_mean.correction": lambda x: A.var_mean.correction(x, [1], correction=0)[0],
    "aten.var_mean.dim": lambda x: A.var_mean.dim(x, [1])[0],
    "aten.where.Scalar": lambda x: torch.where(x > 0, 1.0, -2.0),
    "aten.where.ScalarOther": lambda x: torch.where(x > 0, x, 0.5),
    "aten.where.ScalarSelf": lambda x: torch.where(x > 0, 0.5, x),
    "aten.where.self": lambda x: torch.where(x > 0, x, -x),
    "aten.zeros.default": lambda x: x + torch.zeros(x.shape[0], 1, 1, 1),
    "aten.zeros_like.default": lambda x: x + A.zeros_like(x),
}  # fmt: skip
"""By the operator's name; an operator that is not here takes one tensor alone."""


def call(name: str) -> Call:
    """Return a function of one tensor that calls an operator."""
    _, packet, overload = name.split(".")
    operator: Call = getattr(getattr(A, packet), overload)
    return CALLS.get(name, operator)
