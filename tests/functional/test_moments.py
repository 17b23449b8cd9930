"""Mean and variance of channels."""

import math

import pytest
import torch
import torch.nn.functional as F

from gdfq.functional import moments as moments_module
from gdfq.functional.moments import input_moments, moments, norm_with_moments


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 4), (5, 7, 3, 4), (5, 7, 2, 3, 4)])
def test_moments_match_torch_for_every_rank(shape: tuple[int, ...]) -> None:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 3 + 100
    mean, variance = moments(x)
    columns = x.double().transpose(0, 1).reshape(7, -1)
    assert torch.allclose(mean.double(), columns.mean(1))
    assert torch.allclose(variance.double(), columns.var(1, correction=0), rtol=1e-4)


@pytest.mark.parametrize("channels", [3, 16])
@pytest.mark.parametrize("size", [(9,), (6, 5), (4, 3, 5)])
def test_moments_of_channels_in_the_last_place_of_memory(
    channels: int, size: tuple[int, ...]
) -> None:
    x = torch.randn(5, *size, channels, generator=torch.Generator().manual_seed(0)) * 3 + 100
    mean, variance = moments(x.movedim(-1, 1))
    columns = x.double().reshape(-1, channels)
    assert torch.allclose(mean.double(), columns.mean(0))
    assert torch.allclose(variance.double(), columns.var(0, correction=0), rtol=1e-4)


@pytest.mark.parametrize("ends", [(-math.inf, math.inf), (0.0, math.inf), (0.0, 0.4)])
@pytest.mark.parametrize("part", [1, 2**21])
def test_norm_and_its_gradient_are_those_of_its_definition(
    ends: tuple[float, float], part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it is computed image by image."""
    monkeypatch.setattr(moments_module, "_PART_ELEMENTS", part)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, 4, 6, generator=draw, dtype=torch.double, requires_grad=True)
    scale, shift = torch.randn(2, 1, 3, 1, 1, generator=draw, dtype=torch.double)
    wanted = (
        F.hardtanh(scale * x + shift, *ends),
        x.mean((0, 2, 3)),
        x.var((0, 2, 3), correction=0),
    )
    found = norm_with_moments(x.float(), scale.float(), shift.float(), ends)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    weights = [torch.randn(value.shape, generator=draw, dtype=torch.double) for value in wanted]
    (wanted_grad,) = torch.autograd.grad(wanted, x, weights)
    (found_grad,) = torch.autograd.grad(found, x, [weight.float() for weight in weights])
    torch.testing.assert_close(found_grad, wanted_grad, rtol=1e-5, atol=1e-5)


def test_moments_of_an_input_have_the_gradient_of_their_definition() -> None:
    x = torch.randn(4, 3, 5, 6, dtype=torch.double, requires_grad=True)
    weights = [torch.randn(3, dtype=torch.double) for _ in range(2)]
    wanted = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    (wanted_grad,) = torch.autograd.grad(wanted, x, weights)
    found = input_moments(x.float())
    (found_grad,) = torch.autograd.grad(found, x, [weight.float() for weight in weights])
    torch.testing.assert_close(found_grad, wanted_grad, rtol=1e-5, atol=1e-6)
