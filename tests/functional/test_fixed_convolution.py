"""Convolutions whose weight is fixed, against PyTorch's own."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gdfq.functional.fixed_convolution import fixed_convolution

CASES: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (1, {"stride": [2], "padding": [1], "groups": 2}),
    (2, {}),
    (2, {"stride": [2, 1], "padding": [0, 2], "dilation": [1, 2]}),
    (2, {"groups": 4}),
    (3, {"stride": [1, 2, 1], "padding": [1, 1, 0], "groups": 2}),
]


@pytest.mark.parametrize(("axes", "settings"), CASES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_value_and_gradient_are_those_of_a_convolution(
    axes: int, settings: dict[str, Any], channels_last: bool
) -> None:
    draw = torch.Generator().manual_seed(0)
    groups = settings.get("groups", 1)
    x = torch.randn(3, 4, *[7, 6, 5][:axes], generator=draw)
    if channels_last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    x.requires_grad_()
    weight = torch.randn(8, 4 // groups, *[3] * axes, generator=draw)
    bias = torch.randn(8, generator=draw)
    convolution: Any = (F.conv1d, F.conv2d, F.conv3d)[axes - 1]
    wanted = convolution(x, weight, bias, **settings)
    found = fixed_convolution(x, weight, bias, **settings)
    assert torch.equal(found, wanted)
    grad = torch.randn(found.shape, generator=draw)
    (wanted_grad,) = torch.autograd.grad(wanted, x, grad)
    (found_grad,) = torch.autograd.grad(found, x, grad)
    torch.testing.assert_close(found_grad, wanted_grad)


def test_one_setting_is_for_all_axes() -> None:
    x, weight = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)
    found = fixed_convolution(x, weight, None, (2,), (1,))
    assert torch.equal(found, F.conv2d(x, weight, None, 2, 1))


def test_autograd_keeps_the_weight_alone() -> None:
    x, weight = torch.randn(2, 3, 8, 8, requires_grad=True), torch.randn(4, 3, 3, 3)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        fixed_convolution(x, weight)
    assert [tensor.shape for tensor in kept] == [weight.shape]


def test_input_gets_a_gradient_of_its_own_type_under_autocast() -> None:
    x, weight = torch.randn(2, 3, 8, 8, requires_grad=True), torch.randn(4, 3, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        wanted, found = F.conv2d(x, weight), fixed_convolution(x, weight)
    assert found.dtype == wanted.dtype == torch.bfloat16
    (wanted_grad,) = torch.autograd.grad(wanted.float().square().sum(), x)
    (found_grad,) = torch.autograd.grad(found.float().square().sum(), x)
    assert found_grad.dtype == torch.float32
    torch.testing.assert_close(found_grad, wanted_grad, rtol=0.05, atol=0.5)
