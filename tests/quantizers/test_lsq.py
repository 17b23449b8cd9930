"""Learned scales and the search for the first grid."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import networks
from support.narrowing import present
from torch import Tensor

from gdfq.functional.grid import Layout, affine_grid, channel_range, fake_quantize
from gdfq.quantizers.lsq import (
    LearnedRange,
    LearnedWeight,
    best_range,
    best_weight_grid,
    learned_scale,
    scales_of_channels,
)


def test_learned_scale_matches_hand_computed_values() -> None:
    # k = 2, z = −2: codes without zero point are 0..3. Δ = 0.5 and x/Δ = −1, 0.8, 2.4, 5.
    x = torch.tensor([-0.5, 0.4, 1.2, 2.5], requires_grad=True)
    step = torch.tensor(0.5, requires_grad=True)
    y = learned_scale(x, step, torch.tensor(-2.0), 2)
    assert y.tolist() == [0.0, 0.5, 1.0, 1.5]
    (y * torch.tensor([1.0, 10.0, 100.0, 1000.0])).sum().backward()
    assert present(x.grad).tolist() == [0.0, 10.0, 100.0, 0.0]
    # (q − z) − u inside: 1 − 0.8 and 2 − 2.4; q − z outside: 0 and 3.
    assert float(present(step.grad)) == pytest.approx(10 * 0.2 + 100 * -0.4 + 1000 * 3, rel=1e-5)


@given(
    seed=st.integers(0, 2**31),
    bits=st.integers(2, 8),
    zero=st.floats(0, 1),
    channels_last=st.booleans(),
)
def test_learned_scale_equals_fake_quantize(
    seed: int, bits: int, zero: float, channels_last: bool
) -> None:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, 4, 5, generator=draw)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    zero_point = torch.tensor(round(-(2 ** (bits - 1)) + zero * (2**bits - 1))).float()
    step = torch.rand((), generator=draw) + 0.01
    assert torch.equal(
        learned_scale(x, step, zero_point, bits), fake_quantize(x, step, zero_point, bits)
    )


def test_learned_scale_gradient_matches_autograd() -> None:
    """The same function composed of differentiable operations, rounding detached."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, 4, generator=draw).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(2, 3, 4, 4, generator=draw)
    grads = []
    for composed in (False, True):
        a, step = x.clone().requires_grad_(), torch.tensor(0.3, requires_grad=True)
        if composed:
            u = a / step
            inside = u.clamp(-2, 5)
            y = (inside + (inside.round() - inside).detach()) * step
        else:
            y = learned_scale(a, step, torch.tensor(-2.0), 3)  # codes −4..3, so q − z is −2..5
        (y * weight).sum().backward()
        grads.append((present(a.grad), present(step.grad)))
    assert torch.allclose(grads[0][0], grads[1][0], atol=1e-6)
    assert torch.allclose(grads[0][1], grads[1][1], rtol=1e-4)


@given(seed=st.integers(0, 2**31), bits=st.integers(2, 5))
def test_weight_search_is_never_worse_than_the_full_range(seed: int, bits: int) -> None:
    weight = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(seed)) ** 3
    full = affine_grid(*channel_range(weight, Layout.ROWS), bits)
    best = best_weight_grid(weight, bits, Layout.ROWS)

    def errors(grid: tuple[Tensor, Tensor]) -> Tensor:
        return (
            (fake_quantize(weight, grid[0], grid[1], bits) - weight)
            .abs()
            .pow(2.4)
            .flatten(1)
            .sum(1)
        )

    assert bool((errors(best) <= errors(full) * (1 + 1e-6)).all())


def test_weight_search_clips_an_outlier() -> None:
    """999 weights within ±1 and one of 6: at 2 bits a grid for the majority has a smaller error."""
    weight = torch.linspace(-1, 1, 1000).view(1, -1).clone()
    weight[0, 500] = 6.0
    step, _ = best_weight_grid(weight, 2, Layout.ROWS)
    full, _ = affine_grid(*channel_range(weight, Layout.ROWS), 2)
    assert float(step) < 0.6 * float(full)


@pytest.mark.parametrize("groups", [1, 2])
def test_weight_search_uses_the_channels_of_a_transposed_weight(groups: int) -> None:
    rows = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    rows *= torch.tensor([1, 2, 4, 8, 16, 32.0]).view(-1, 1, 1, 1)
    # [O, I/g, *k] -> [I, O/g, *k]
    transposed = rows.view(groups, 6 // groups, 4, 3, 3).transpose(1, 2).flatten(0, 1)
    step, zero = best_weight_grid(transposed, 3, Layout.TRANSPOSED, groups)
    expected, expected_zero = best_weight_grid(rows, 3, Layout.ROWS)
    again = fake_quantize(transposed, step, zero, 3).view(groups, 4, 6 // groups, 3, 3)
    wanted = fake_quantize(rows, expected, expected_zero, 3)
    assert torch.allclose(again.transpose(1, 2).reshape(6, 4, 3, 3), wanted, atol=1e-5)


def test_range_search_matches_brute_force() -> None:
    x = torch.randn(4000, generator=torch.Generator().manual_seed(1)).relu_()
    step, zero_point = best_range(x, 3)
    errors = {
        top: float((fake_quantize(x, *affine_grid(torch.tensor(0.0), top, 3), 3) - x).square().mean())
        for top in torch.linspace(0.2, float(x.max()), 300)
    }  # fmt: skip
    best = min(errors, key=errors.__getitem__)
    found = float((fake_quantize(x, step, zero_point, 3) - x).square().mean())
    assert found <= errors[best] * 1.02
    assert float(step) * 7 < 0.9 * float(x.max())  # it clips


def test_learned_weight_starts_on_the_searched_grid_and_learns() -> None:
    weight = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    quantizer = LearnedWeight(weight, 3, Layout.ROWS)
    step, zero_point = best_weight_grid(weight, 3, Layout.ROWS)
    on_grid = quantizer(weight)
    assert torch.allclose(on_grid, fake_quantize(weight, step, zero_point, 3), atol=1e-6)
    on_grid.square().sum().backward()
    clipped = (quantizer.codes < -4) | (quantizer.codes > 3)
    assert clipped.any()
    assert torch.equal(present(quantizer.codes.grad)[clipped], torch.zeros(int(clipped.sum())))
    # ∂/∂(ln Δ) Σ w_q² = 2 Σ w_q², because w_q is proportional to Δ.
    expected = 2 * on_grid.detach().square().flatten(1).sum(1)
    assert torch.allclose(present(quantizer.log_scale.grad).flatten(), expected, rtol=1e-4)
    final = quantizer.quantized(weight)
    assert final.codes.dtype is torch.int8
    assert torch.allclose((final.codes - final.zero_point) * final.scale, on_grid.detach())


def test_learned_range_averages_its_batches() -> None:
    quantizer = LearnedRange(4)
    quantizer.observing = True
    draw = torch.Generator().manual_seed(0)
    batches = [torch.rand(1000, generator=draw) * top for top in (1.0, 3.0)]
    steps = [float(best_range(batch, 4)[0]) for batch in batches]
    for batch in batches:
        quantizer(batch)
    scale, zero_point = quantizer.grid()
    assert float(scale) == pytest.approx(sum(steps) / 2, rel=1e-5)
    assert float(zero_point) == -8


def test_range_reaches_beyond_what_was_observed() -> None:
    """Room for 1.2 times the largest value; a known range is covered as it is."""
    x = torch.linspace(0, 3, 1000)
    for known, top in ((None, 1.2 * 3), ((0.0, 3.0), 3)):
        quantizer = LearnedRange(8)
        quantizer.known_range, quantizer.reach, quantizer.observing = known, 1.2, True
        quantizer(x)
        assert float(quantizer.grid()[0]) * 255 == pytest.approx(top, rel=0.01)


def test_scales_of_channels_are_those_of_each_alone() -> None:
    x = networks.images(16, seed=3) * torch.tensor([1.0, 5.0, 0.1]).view(1, 3, 1, 1)
    alone = torch.stack([best_range(x[:, c], 4)[0] for c in range(3)])
    torch.testing.assert_close(scales_of_channels(x, 4), alone, rtol=0.06, atol=0)
