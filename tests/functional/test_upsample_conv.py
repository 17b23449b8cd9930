"""Convolution of an upsampled image."""

import pytest
import torch
import torch.nn.functional as F

from gdfq.functional.upsample_conv import upsampled_convolution


@pytest.mark.parametrize("shape", [(2, 3, 4, 6), (1, 1, 1, 1), (3, 2, 7, 2)])
def test_upsampled_convolution_is_exact(shape: tuple[int, ...]) -> None:
    random = torch.Generator().manual_seed(0)
    n, i, h, w = shape
    x, weight, bias, grad = (
        torch.randn(*s, dtype=torch.double, generator=random)
        for s in (shape, (5, i, 3, 3), (5,), (n, 5, 2 * h, 2 * w))
    )
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    expected = F.conv2d(F.interpolate(x, scale_factor=2), weight, bias, padding=1)
    actual = upsampled_convolution(x, weight, bias)
    assert torch.allclose(actual, expected)
    for a, b in zip(
        torch.autograd.grad(actual, inputs, grad),
        torch.autograd.grad(expected, inputs, grad),
        strict=True,
    ):
        assert torch.allclose(a, b)
