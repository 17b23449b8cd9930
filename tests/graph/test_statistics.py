"""Batch-norm statistics of images and their loss, against module hooks."""

import pytest
import torch
from support import networks
from support.narrowing import present
from torch import Tensor, nn

from gdfq import UsageError
from gdfq.functional.losses import batch_norm_statistics_loss
from gdfq.graph.capture import Captured, capture
from gdfq.graph.statistics import StatisticsNetwork, first_moments


def independent_loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The statistics loss by hooks and textbook formulas."""
    layers = []

    def hook(module: nn.BatchNorm2d, inputs: tuple[Tensor]) -> None:
        (value,) = inputs
        dims = [d for d in range(value.ndim) if d != 1]
        mean = value.mean(dims)
        shape = (1, -1, *([1] * (value.ndim - 2)))
        variance = ((value - mean.view(shape)) ** 2).mean(dims)
        layers.append(
            ((mean - present(module.running_mean)) ** 2).mean()
            + ((variance - present(module.running_var)) ** 2).mean()
        )

    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    handles = [norm.register_forward_pre_hook(hook) for norm in norms]
    model(x)
    for handle in handles:
        handle.remove()
    return torch.stack(layers).mean()


def test_loss_and_gradient_match_hooks(any_network: nn.Module, any_teacher: Captured) -> None:
    network = StatisticsNetwork(any_teacher)
    x = networks.images(6).requires_grad_()
    logits, seen = network(x)
    assert torch.allclose(logits, any_network(x), atol=1e-5)
    loss = batch_norm_statistics_loss(seen, network.stored)
    (grad,) = torch.autograd.grad(loss + logits.square().mean(), x)

    exact = any_network.double()
    y = x.detach().double().requires_grad_()
    expected = independent_loss(exact, y)
    (expected_grad,) = torch.autograd.grad(expected + exact(y).square().mean(), y)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert torch.allclose(grad.double(), expected_grad, rtol=1e-3, atol=1e-5)


def test_network_without_batch_norm_is_refused() -> None:
    plain = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    with pytest.raises(UsageError, match="this network has none"):
        StatisticsNetwork(capture(plain, networks.images(1)))


def test_first_moments_are_those_of_the_whole_network(any_teacher: Captured) -> None:
    x = networks.images(6)
    _, seen = StatisticsNetwork(any_teacher)(x)
    for found, wanted in zip(first_moments(any_teacher)(x), seen[0], strict=True):
        assert torch.equal(found, wanted)


class ComputedBias(nn.Module):
    """A convolution whose bias depends on the image, after a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm2d(3), nn.Linear(3, 4)
        self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))
        self.last = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        bias = self.linear(y.mean((0, 2, 3)))
        return self.last(torch.nn.functional.conv2d(y, self.weight, bias)).mean((2, 3))


def test_bias_that_depends_on_the_image_has_its_gradient() -> None:
    model = ComputedBias().eval()
    x = networks.images(4).requires_grad_()
    network = StatisticsNetwork(capture(model, x.detach()))
    outputs, _ = network(x)
    (found,) = torch.autograd.grad(outputs.square().sum(), x)
    (wanted,) = torch.autograd.grad(model(x).square().sum(), x)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
