"""Kinds of operators that files of every target are tried with, each between convolutions.

A target must write an equal file of a kind, or refuse it before anything is quantized.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from support.surrounded import Of
from torch import Tensor, nn

SHAPE = (4, 11, 9)
"""Odd and unequal sides, so that no padding is symmetric by chance."""

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "strided": lambda: nn.Conv2d(8, 8, 3, 2, 1),
    "strided_even_kernel": lambda: nn.Conv2d(8, 8, 4, 2, 1),
    "one_sided_same": lambda: nn.Conv2d(8, 8, 4, padding="same"),
    "uneven": lambda: nn.Conv2d(8, 8, (3, 5), (2, 1), (0, 2)),
    "dilated": lambda: nn.Conv2d(8, 8, 3, 1, 2, 2),
    "dilated_strided": lambda: nn.Conv2d(8, 8, 3, 2, 2, (2, 1)),
    "wide_padding": lambda: nn.Conv2d(8, 8, 3, 1, 3),
    "grouped": lambda: nn.Conv2d(8, 12, 3, 1, 1, groups=4),
    "depthwise": lambda: nn.Conv2d(8, 8, 3, 2, 1, groups=8),
    "depthwise_multiplied": lambda: nn.Conv2d(8, 16, 5, 1, 2, groups=8, bias=False),
    "depthwise_dilated": lambda: nn.Conv2d(8, 8, 3, 1, 2, 2, groups=8),
    "transposed": lambda: nn.ConvTranspose2d(8, 6, 2, 2),
    "transposed_padded": lambda: nn.ConvTranspose2d(8, 6, 4, 2, 1),
    "transposed_odd": lambda: nn.ConvTranspose2d(8, 6, 3, 2, 1, 1),
    "transposed_uneven": lambda: nn.ConvTranspose2d(8, 6, (3, 2), (1, 2), (2, 0)),
    "transposed_dilated": lambda: nn.ConvTranspose2d(8, 6, 3, 3, 1, 1, dilation=2),
    "transposed_grouped": lambda: nn.ConvTranspose2d(8, 12, 3, 2, 1, groups=2),
    "transposed_depthwise": lambda: nn.ConvTranspose2d(8, 8, 4, 2, 1, groups=8, bias=False),
    "transposed_stride_beyond_kernel": lambda: nn.ConvTranspose2d(8, 6, 1, 2),
    "max_pool": lambda: nn.MaxPool2d(2),
    "max_pool_padded": lambda: nn.MaxPool2d(3, 2, 1),
    "max_pool_ceil": lambda: nn.MaxPool2d(2, 2, ceil_mode=True),
    "avg_pool": lambda: nn.AvgPool2d(2),
    "avg_pool_padded": lambda: nn.AvgPool2d(3, 2, 1),
    "avg_pool_without_padding": lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    "avg_pool_ceil": lambda: nn.AvgPool2d(2, 2, ceil_mode=True),
    "avg_pool_divisor": lambda: nn.AvgPool2d(3, 2, divisor_override=5),
    "avg_pool_large": lambda: nn.AvgPool2d(7, 2),
    "adaptive_avg": lambda: nn.AdaptiveAvgPool2d((4, 3)),
    "adaptive_avg_one": lambda: nn.AdaptiveAvgPool2d(1),
    "adaptive_max": lambda: nn.AdaptiveMaxPool2d((4, 3)),
    "nearest": lambda: nn.Upsample(scale_factor=2),
    "nearest_odd": lambda: nn.Upsample(size=(16, 10)),
    "bilinear": lambda: nn.Upsample(scale_factor=2, mode="bilinear"),
    "bilinear_aligned": lambda: nn.Upsample(size=(15, 20), mode="bilinear", align_corners=True),
    "reflected": lambda: nn.ReflectionPad2d((1, 2, 3, 0)),
    "replicated": lambda: nn.ReplicationPad2d((1, 2, 3, 0)),
    "padded": lambda: nn.ZeroPad2d((1, 0, 2, 3)),
    "hard_swish": nn.Hardswish,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "sigmoid": nn.Sigmoid,
    "hard_sigmoid": nn.Hardsigmoid,
    "tanh": nn.Tanh,
    "leaky_relu": lambda: nn.LeakyReLU(0.1),
    "prelu": lambda: nn.PReLU(8),
    "elu": nn.ELU,
    "elu_scaled": lambda: nn.ELU(0.5),
    "softplus": nn.Softplus,
    "mish": nn.Mish,
    "relu6": nn.ReLU6,
    "hardtanh": lambda: nn.Hardtanh(-0.5, 0.7),
    "softmax": lambda: nn.Softmax(1),
    "channel_shuffle": lambda: nn.ChannelShuffle(4),
    "pixel_shuffle": lambda: nn.PixelShuffle(2),
    "pixel_unshuffle": lambda: nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.PixelUnshuffle(2)),
    "group_norm": lambda: nn.GroupNorm(2, 8),
    "instance_norm": lambda: nn.InstanceNorm2d(8, affine=True),
    "batch_norm": lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(8)),
}

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "residual": lambda x: x + F.hardtanh(x, -1, 0.5),
    "difference": lambda x: x - x.roll(1, 2),
    "product": lambda x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)),
    "constant_sum": lambda x: x + torch.linspace(-1, 1, 8).view(8, 1, 1),
    "cat": lambda x: torch.cat([x, F.silu(x)], 1),
    "cat_of_one_grid": lambda x: torch.cat([x[:, :3], x[:, 5:]], 1),
    "cat_rows": lambda x: torch.cat([x, F.tanh(x)], 2),
    "stack": lambda x: torch.stack([x, F.silu(x)], 1).flatten(1, 2),
    "sliced": lambda x: x[:, 1:7, ::2, 1:],
    "flipped": lambda x: x.flip(2, 3),
    "rolled": lambda x: x.roll((1, -2), (2, 3)),
    "shuffled": lambda x: x.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2),
    "swapped": lambda x: x.transpose(2, 3),
    "largest": lambda x: x * x.amax((2, 3), keepdim=True),
    "maximum": lambda x: torch.maximum(x, F.silu(x)),
    "root": lambda x: torch.sqrt(x + 0.1),
    "divided": lambda x: x / (x.mean(1, keepdim=True) + 1),
    "squeeze_and_excite": lambda x: x * F.hardsigmoid(x.mean((2, 3))).unsqueeze(2).unsqueeze(3),
    "normalised": lambda x: F.layer_norm(x, x.shape[1:]),
    "root_mean_square": lambda x: F.rms_norm(x, x.shape[2:]),
    "attention": lambda x: (
        (x.flatten(2).transpose(1, 2) @ x.flatten(2) / 3).softmax(-1)
        @ x.flatten(2).transpose(1, 2)
    ).transpose(1, 2).unflatten(2, (11, 9)),
}  # fmt: skip

RARE: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(792, 24), nn.Unflatten(1, (8, 3, 1))),
    "linear_of_columns": lambda: nn.Linear(9, 6),
    "sequence": lambda: nn.Sequential(
        nn.Flatten(2), nn.Conv1d(8, 8, 3), nn.ReLU(), nn.AvgPool1d(2), nn.MaxPool1d(3, 2, 1),
        nn.Unflatten(2, (12, 2)),
    ),
    "sequence_transposed": lambda: nn.Sequential(
        nn.Flatten(2), nn.ConvTranspose1d(8, 8, 4, 2, 1), nn.Unflatten(2, (18, 11))
    ),
    "volume": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 4)), nn.Conv3d(2, 3, 3, padding=1), nn.AvgPool3d(2), nn.Flatten(1, 2)
    ),
    "max_pool_dilated": lambda: nn.MaxPool2d(3, 1, 1, 2),
    "avg_pool_beyond": lambda: nn.AvgPool2d(4, 2, 1, ceil_mode=True),
    "avg_pool_beyond_without_padding": lambda: nn.AvgPool2d(
        (3, 4), 2, 1, ceil_mode=True, count_include_pad=False
    ),
    "adaptive_avg_even": lambda: nn.AdaptiveAvgPool2d((11, 3)),
    "bicubic": lambda: nn.Upsample(scale_factor=2, mode="bicubic"),
    "bilinear_smaller": lambda: nn.Upsample(size=(6, 5), mode="bilinear"),
    "wrapped": lambda: nn.CircularPad2d((1, 2, 3, 0)),
    "local_response_norm": lambda: nn.LocalResponseNorm(3),
    "log_softmax": lambda: nn.LogSoftmax(1),
    "glu": lambda: nn.GLU(1),
    "selu": nn.SELU,
    "celu": lambda: nn.CELU(0.7),
    "prelu_one": lambda: nn.PReLU(1),
}  # fmt: skip
RARE_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "antialiased": lambda x: F.interpolate(x, (5, 4), mode="bilinear", antialias=True),
    "fused_attention": lambda x: F.scaled_dot_product_attention(
        *x.flatten(2).transpose(1, 2).unflatten(2, (2, 4)).transpose(1, 2).unsqueeze(0).expand(
            3, -1, -1, -1, -1)
    ).transpose(2, 3).flatten(1, 2).unflatten(2, (11, 9)),
    "error_function": torch.erf,
    "exponential": lambda x: torch.exp(-x),
    "power": lambda x: (x + 0.1) ** 1.5,
    "absolute": lambda x: (x - 0.3).abs(),
    "negative": lambda x: -x,
    "reversed_difference": lambda x: 1 - x,
    "negative_factors": lambda x: x * torch.linspace(-1, 1, 8).view(8, 1, 1),
    "factors_of_positions": lambda x: x * torch.linspace(0.5, 1.5, 99).view(11, 9),
    "minimum": lambda x: torch.minimum(x, 0.2 + 0 * x.flip(2)),
    "clamped_below": lambda x: x.clamp(min=0.1),
    "masked": lambda x: torch.where(x > 0.2, x, 0.1 * x),
    "chunks": lambda x: torch.cat([part.flip(1) for part in x.chunk(3, 1)], 1),
    "unbound": lambda x: torch.stack(x.unbind(1)[::-1], 1),
    "repeated": lambda x: x.repeat(1, 2, 1, 1),
    "summed": lambda x: x.sum((2, 3), keepdim=True) / 50 + x,
    "mean_of_channels": lambda x: x.mean(1, keepdim=True).expand(-1, 8, -1, -1),
    "largest_of_channels": lambda x: x.max(1, keepdim=True)[0] - x,
    "variance": lambda x: x / (x.var(1, keepdim=True) + 0.1),
    "row": lambda x: x[:, :, 3:4].expand(-1, -1, 11, -1) + x,
    "einsum": lambda x: torch.einsum("nchw,nkhw->nchk", x, x) / 9,
    "unfolded": lambda x: F.unfold(x, 3, padding=1).unflatten(2, (11, 9)),
}  # fmt: skip
"""Rarer ones, some of which not every target has a form for."""

KINDS: Mapping[str, Callable[[], nn.Module]] = {
    **LAYERS,
    **RARE,
    **{name: partial(Of, f) for name, f in (FUNCTIONS | RARE_FUNCTIONS).items()},
}
"""All of them, as modules that take maps of 8 channels."""
