"""Every function of gdfq.functional computes on a GPU, and in float32 what layers gave in bfloat16."""

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.simulated_gpu import GPU, GpuTensor, simulated_gpu, values_of
from torch import Tensor

import gdfq.functional
from gdfq.functional import (
    fixed_convolution,
    float_grid,
    frechet,
    gemmlowp,
    grid,
    integer,
    losses,
    moments,
    reassembly,
    rotations,
    rounding,
    screening,
    signal_noise,
    upsample_conv,
    windows,
)
from gdfq.functional.grid import Layout
from gdfq.graph.outputs import in_order

Call = Callable[[Callable[..., Tensor]], Any]
"""Calls a function on tensors that its argument makes: make(shape), drawn in order."""

_ROWS = Layout.ROWS
_OF = (torch.tensor(0.1), torch.tensor(-3.0))
"""Scale and zero point of an activation."""


def _of_weight(make: Callable[..., Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Weight [4, 3, 3, 3], its scales and its zero points."""
    weight = make(4, 3, 3, 3)
    return weight, make(4, 1, 1, 1).detach().abs() + 0.1, make(4, 1, 1, 1).detach().round()


def _statistics(make: Callable[..., Tensor]) -> list[tuple[Tensor, Tensor]]:
    return [(make(c), make(c).abs() + 0.5) for c in (3, 5)]


def _of_images(make: Callable[..., Tensor], channels: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of each of four images."""
    return make(4, channels).detach(), make(4, channels).detach().abs()


def _covariance(make: Callable[..., Tensor]) -> Tensor:
    x = make(2, 4, 9).detach()
    return x @ x.mT


def _system(make: Callable[..., Tensor]) -> Tensor:
    return _covariance(make) + torch.eye(4).to(make(1).device)


def _labels(make: Callable[..., Tensor]) -> Tensor:
    return torch.arange(6).to(make(1).device) % 5


def _sums(make: Callable[..., Tensor]) -> Tensor:
    return make(3, 4).detach().mul(100).long()


def _of(make: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    return _OF[0].to(make(1).device), _OF[1].to(make(1).device)


CALLS: dict[Callable[..., Any], Call] = {
    losses.class_boundary_loss: lambda m: losses.class_boundary_loss(m(6, 5), _labels(m)),
    losses.batch_norm_statistics_loss: lambda m: losses.batch_norm_statistics_loss(_statistics(m), _statistics(m)),
    losses.standard_deviation_loss: lambda m: losses.standard_deviation_loss(_statistics(m), _statistics(m)),
    losses.relative_statistics_loss: lambda m: losses.relative_statistics_loss(_statistics(m), _statistics(m)),
    losses.focal_loss: lambda m: losses.focal_loss(m(6, 5), _labels(m), 2.0),
    losses.feature_loss: lambda m: losses.feature_loss([m(2, 3, 4, 4), m(2, 7)], [m(2, 3, 4, 4), m(2, 7)]),
    losses.patch_entropy: lambda m: losses.patch_entropy(m(2, 5, 7)),
    losses.patch_entropies: lambda m: losses.patch_entropies(m(2, 5, 7)),
    losses.next_token_losses: lambda m: losses.next_token_losses(m(2, 6, 5), _labels(m).expand(2, -1)),
    losses.token_divergences: lambda m: losses.token_divergences(m(2, 6, 5), m(2, 6, 5)),
    losses.inner: lambda m: losses.inner(m(2, 3, 4, 4), m(2, 3, 4, 4)),
    losses.distillation_loss: lambda m: losses.distillation_loss(m(6, 5), m(6, 5), 4.0, "batch"),
    screening.energy: lambda m: screening.energy(m(6, 5), 2.0),
    screening.image_moments: lambda m: screening.image_moments(m(4, 3, 5, 5)),
    screening.joint_moments: lambda m: screening.joint_moments(*_of_images(m, 3)),
    screening.moments_without_each: lambda m: screening.moments_without_each(*_of_images(m, 3)),
    screening.batch_norm_sensitivity: lambda m: screening.batch_norm_sensitivity([_of_images(m, c) for c in (3, 5)], _statistics(m)),
    moments.moments: lambda m: moments.moments(m(4, 3, 5, 5).detach()),
    moments.norm_with_moments: lambda m: moments.norm_with_moments(m(4, 3, 5, 5), m(1, 3, 1, 1).detach(), m(1, 3, 1, 1).detach()),
    fixed_convolution.fixed_convolution: lambda m: fixed_convolution.fixed_convolution(m(2, 4, 5, 5), m(6, 2, 3, 3).detach(), m(6).detach(), (2, 1), (1, 0), groups=2),
    moments.input_moments: lambda m: moments.input_moments(m(4, 3, 5, 5)),
    upsample_conv.upsampled_convolution: lambda m: upsample_conv.upsampled_convolution(m(2, 3, 4, 4), m(5, 3, 3, 3), m(5)),
    grid.affine_grid: lambda m: grid.affine_grid(-m(4).abs(), m(4).abs(), 4),
    grid.symmetric_grid: lambda m: grid.symmetric_grid(-m(4).abs(), m(4).abs(), 4),
    grid.range_grid: lambda m: grid.range_grid(-m(4).abs(), m(4).abs(), 4, symmetric=True),
    grid.largest_scale: lambda m: grid.largest_scale(_of(m)[1], 8, (-1.0, 1.0)),
    grid.weight_grid: lambda m: grid.weight_grid(-m(4).abs(), m(4).abs(), 4),
    grid.along_channels: lambda m: grid.along_channels(m(4), m(4, 3, 3, 3), _ROWS),
    grid.channel_range: lambda m: grid.channel_range(m(4, 4, 3, 3), Layout.TRANSPOSED, 2),
    grid.quantize: lambda m: grid.quantize(m(4, 3).detach(), *_of(m), 8),
    grid.dequantize: lambda m: grid.dequantize(m(4, 3).detach().round().to(torch.int8), *_of(m), 8),
    grid.dequantize_bias: lambda m: grid.dequantize_bias(m(4).detach().int(), _of(m)[0], _of_weight(m)[1]),
    grid.quantize_bias: lambda m: grid.quantize_bias(m(4).detach(), _of(m)[0], _of_weight(m)[1]),
    grid.room_for_bias: lambda m: grid.room_for_bias(m(4).detach(), _of(m)[0], _of_weight(m)[1]),
    grid.fake_quantize: lambda m: grid.fake_quantize(m(4, 3).detach(), *_of(m), 8),
    grid.fake_quantize_tokens: lambda m: grid.fake_quantize_tokens(m(4, 3).detach(), 4),
    grid.token_scales: lambda m: grid.token_scales(m(4, 3).detach(), 4),
    grid.of_columns: lambda m: grid.of_columns(m(2, 3).detach(), 7),
    grid.along_blocks: lambda m: grid.along_blocks(m(4, 2).detach(), m(4, 6).detach()),
    grid.tokens_straight_through: lambda m: grid.tokens_straight_through(m(4, 3), 4),
    grid.straight_through: lambda m: grid.straight_through(m(4, 3), *_of(m), 8),
    rounding.fitted_weight: lambda m: rounding.fitted_weight(m(2, 3, 4).detach(), _covariance(m), m(2, 3, 4).detach(), m(2).detach().abs()),
    rounding.nearest_codes: lambda m: rounding.nearest_codes(m(2, 3, 1).detach().round(), 4)(m(2, 3, 4).detach()),
    rounding.output_error: lambda m: rounding.output_error(m(2, 3, 4).detach(), _covariance(m), m(2, 3, 4).detach()),
    rounding.inverse_factor: lambda m: rounding.inverse_factor(_system(m)).upper,
    rounding.compensated: lambda m: rounding.compensated(m(2, 3, 4).detach(), rounding.inverse_factor(_system(m)), m(2, 3, 4).detach().abs() + 0.1, torch.round),
    rounding.descended: lambda m: rounding.descended(m(2, 3, 4).detach(), _system(m), m(2, 3, 4).detach().abs() + 0.1, m(2, 3, 4).detach(), torch.round),
    rounding.refitted_scale: lambda m: rounding.refitted_scale(m(2, 3, 4).detach(), _system(m), m(2, 3, 2).detach().abs() + 0.1, m(2, 3, 4).detach().round()),
    rounding.rounded_for_outputs: lambda m: rounding.rounded_for_outputs(m(2, 3, 4).detach(), _covariance(m), m(2).detach().abs() + 0.1, m(2, 3, 2).detach().abs() + 0.1, torch.round, 4),
    rotations.rotated: lambda m: rotations.rotated(m(2, 12), m(3, 3), m(4, 4)),
    reassembly.reassembled: lambda m: reassembly.reassembled(m(2, 4), torch.arange(4).to(m(1).device), torch.arange(4).to(m(1).device), m(2, 4)),
    reassembly.new_channels: lambda m: reassembly.new_channels(m(9, 6).detach(), m(3, 6).detach(), 1.0).shares,
    frechet.frechet_distance: lambda m: frechet.frechet_distance(m(6, 3).detach(), m(5, 3).detach()),
    signal_noise.min_snr_weights: lambda m: signal_noise.min_snr_weights(m(4).detach().abs(), "v_prediction"),
    float_grid.magnitudes: lambda m: float_grid.magnitudes(float_grid.E4M3).to(m(1).device),
    float_grid.nearest: lambda m: float_grid.nearest(m(4, 3).detach(), float_grid.E4M3),
    float_grid.nearest_: lambda m: float_grid.nearest_(m(4, 3).detach(), float_grid.E4M3),
    float_grid.neighbours: lambda m: float_grid.neighbours(m(4, 3).detach(), float_grid.E2M1),
    float_grid.encode: lambda m: float_grid.encode(m(4, 3).detach().round(), float_grid.E2M1),
    float_grid.decode: lambda m: float_grid.decode(m(4, 3).detach().abs().to(torch.uint8), float_grid.E2M1),
    float_grid.fake_quantize_float: lambda m: float_grid.fake_quantize_float(m(4, 3).detach(), _of(m)[0], "E4M3"),
    float_grid.dequantize_float: lambda m: float_grid.dequantize_float(m(4, 3).detach().abs().to(torch.uint8), _of(m)[0], "E4M3"),
    float_grid.full_scale: lambda m: float_grid.full_scale(m(4).abs(), float_grid.E4M3),
    float_grid.best_scale: lambda m: float_grid.best_scale(m(9).detach(), _of(m)[0], float_grid.E4M3, torch.sum),
    float_grid.best_format: lambda m: float_grid.best_format(m(9).detach(), _of(m)[0], [float_grid.E2M1, float_grid.E3M0], torch.sum)[1],
    integer.values: lambda m: integer.values(m(4, 3), _of(m)[0]),
    integer.products: lambda m: integer.products(F.conv2d, 2, m(2, 3, 5, 5).detach(), *_of_weight(m)[::2]),
    integer.with_bias: lambda m: integer.with_bias(m(2, 4, 3).detach(), m(4).detach().int(), 1, False),
    integer.along: lambda m: integer.along(_of_weight(m)[1], 3, 1),
    integer.rescaled: lambda m: integer.rescaled(m(2, 4, 3), _of(m)[0], _of_weight(m)[1], 1),
    integer.in_steps: lambda m: integer.in_steps(m(2, 4, 3), _of(m)[0], _of_weight(m)[1], 1, _of(m)[0]),
    integer.mean_in_steps: lambda m: integer.mean_in_steps(m(2, 4, 3), [1, 2], True, _of(m)[0], _of(m)[0]),
    integer.steps_of: lambda m: integer.steps_of(m(4, 3), _of(m)[0]),
    gemmlowp.doubling_high_product: lambda m: gemmlowp.doubling_high_product(_sums(m), 2**30),
    gemmlowp.rounding_right_shift: lambda m: gemmlowp.rounding_right_shift(_sums(m), 3),
    gemmlowp.requantized: lambda m: gemmlowp.requantized(_sums(m), [0.1, 0.2, 0.3, 0.4], 1),
    gemmlowp.requantized_sum: lambda m: gemmlowp.requantized_sum(_sums(m), _sums(m), (0.1, 0.2), 0.3),
    windows.zero_padded: lambda m: windows.zero_padded(m(2, 3, 4), [(1, 0), (0, 2)]),
    integer.rounded: lambda m: integer.rounded(m(4, 3).detach(), -3.0, 4.0),
}  # fmt: skip
RETURN_NUMBERS: dict[Callable[..., Any], Call] = {
    grid.clips_alike: lambda m: grid.clips_alike((0.0, 6.0), *_of(m), 8),
    reassembly.merged_pairs: lambda m: reassembly.merged_pairs(
        m(9, 6).detach(), m(3, 6).detach(), m(6).detach() < 9, 2
    ),
    integer.offset_bounds: lambda m: integer.offset_bounds(_of(m)[1], 8),
    integer.exact_parts: lambda m: integer.exact_parts(
        m(4, 3, 3, 3).detach(), _of_weight(m)[2], 255.0
    ),
    integer.is_exact: lambda m: integer.is_exact(m(4).detach().int()),
}
WITHOUT_TENSORS = {
    grid.code_bounds,
    grid.block_size,
    rotations.hadamard,
    rotations.random_factors,
    float_grid.formats_of,
} | {
    gemmlowp.quantized_multiplier,
    *(windows.per_axis, windows.padding_ends, windows.source_pixels, windows.floored),
}


def _made_on(device: str, leaves: list[Tensor], dtype: torch.dtype) -> Callable[..., Tensor]:
    draw = torch.Generator().manual_seed(0)

    def make(*shape: int) -> Tensor:
        leaf = torch.randn(*shape, generator=draw).to(dtype).to(device).requires_grad_()
        leaves.append(leaf)
        return leaf

    return make


def _computed(
    call: Call, device: str, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], list[Tensor]]:
    """Results and gradients of a call."""
    leaves: list[Tensor] = []
    found = list(in_order(call(_made_on(device, leaves, dtype))))
    differentiable = [value for value in found if value.requires_grad]
    if differentiable:
        torch.stack([value.sum() for value in differentiable]).sum().backward()
    return found, [leaf.grad for leaf in leaves if leaf.grad is not None]


def test_all_equations_are_called() -> None:
    """A new function of gdfq.functional needs a call here."""
    names = [module.name for module in pkgutil.iter_modules(gdfq.functional.__path__)]
    functions = {
        function
        for name in names
        for _, function in inspect.getmembers(
            importlib.import_module(f"gdfq.functional.{name}"), inspect.isfunction
        )
        if function.__module__ == f"gdfq.functional.{name}"
        and not function.__name__.startswith("_")
    }
    assert functions == {*CALLS, *RETURN_NUMBERS} | WITHOUT_TENSORS


@pytest.mark.parametrize("function", CALLS, ids=lambda function: function.__name__)
def test_equation_computes_on_a_gpu(function: Callable[..., Any]) -> None:
    expected = _computed(CALLS[function], "cpu")
    with simulated_gpu():
        actual = _computed(CALLS[function], "cuda")
        assert all(isinstance(t, GpuTensor) and t.device == GPU for t in (*actual[0], *actual[1]))
    for one, other in zip(expected, actual, strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(values_of(b), a.detach())


@pytest.mark.parametrize("function", RETURN_NUMBERS, ids=lambda function: function.__name__)
def test_equation_of_numbers_computes_on_a_gpu(function: Callable[..., Any]) -> None:
    expected = RETURN_NUMBERS[function](_made_on("cpu", [], torch.float32))
    with simulated_gpu():
        actual = RETURN_NUMBERS[function](_made_on("cuda", [], torch.float32))
    assert actual == expected


READS_LAYERS = (
    *(losses.class_boundary_loss, losses.focal_loss, losses.feature_loss),
    *(losses.distillation_loss, moments.norm_with_moments, screening.energy),
)
"""Functions whose arguments layers compute."""


@pytest.mark.parametrize("function", READS_LAYERS, ids=lambda function: function.__name__)
def test_equation_computes_in_float32_what_layers_give(function: Callable[..., Any]) -> None:
    def wide(make: Callable[..., Tensor]) -> Any:
        return CALLS[function](lambda *shape: make(*shape).float())

    with torch.autocast("cpu", torch.bfloat16):
        actual, grads = _computed(CALLS[function], "cpu", torch.bfloat16)
        expected, _ = _computed(wide, "cpu", torch.bfloat16)
    assert {tensor.dtype for tensor in actual} == {torch.float32}
    assert {grad.dtype for grad in grads} == {torch.bfloat16}
    for one, other in zip(expected, actual, strict=True):
        assert one.equal(other)
