import pytest
import torch
from support import networks
from torch import nn

from gdfq import UsageError
from gdfq.functional.losses import batch_norm_statistics_loss
from gdfq.functional.moments import moments
from gdfq.graph.capture import capture
from gdfq.graph.statistics import StatisticsNetwork
from gdfq.sources.input_scale import estimate_input_statistics


def independent_loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The statistics loss by hooks and textbook formulas."""
    layers = []

    def hook(module, inputs):
        (value,) = inputs
        dims = [d for d in range(value.ndim) if d != 1]
        mean = value.mean(dims)
        shape = (1, -1, *([1] * (value.ndim - 2)))
        variance = ((value - mean.view(shape)) ** 2).mean(dims)
        layers.append(
            ((mean - module.running_mean) ** 2).mean()
            + ((variance - module.running_var) ** 2).mean()
        )

    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    handles = [norm.register_forward_pre_hook(hook) for norm in norms]
    model(x)
    for handle in handles:
        handle.remove()
    return torch.stack(layers).mean()


def test_loss_and_gradient_against_hooks(any_network, any_teacher):
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


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 4), (5, 7, 3, 4), (5, 7, 2, 3, 4)])
def test_moments_of_every_rank(shape):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 3 + 100
    mean, variance = moments(x)
    columns = x.double().transpose(0, 1).reshape(7, -1)
    assert torch.allclose(mean.double(), columns.mean(1))
    assert torch.allclose(variance.double(), columns.var(1, correction=0), rtol=1e-4)


def test_a_network_without_batch_norm_is_refused():
    plain = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    with pytest.raises(UsageError, match="this network has none"):
        StatisticsNetwork(capture(plain, networks.images(1)))


def trained_on(images: torch.Tensor, first: nn.Module) -> nn.Module:
    """A layer and a batch norm that has seen these images."""
    network = nn.Sequential(first, nn.BatchNorm2d(first.weight.shape[0], momentum=1.0))
    network.train()(images)
    head = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4))
    return nn.Sequential(network, head).eval()


def test_the_first_batch_norm_remembers_its_inputs():
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(16, 3, 12, 12, generator=draw)
    mean = torch.tensor([0.4, -0.2, 100.0])
    seen = mean.view(3, 1, 1) + 25 * noise
    torch.manual_seed(0)
    network = trained_on(seen, nn.Conv2d(3, 12, 3, padding=1))
    found, deviation = estimate_input_statistics(capture(network, seen[:1]), noise)
    assert float(deviation) == pytest.approx(25, rel=0.01)
    assert torch.allclose(found, mean, atol=1.0)


def test_filters_of_zero_sum_say_nothing_of_the_mean():
    noise = torch.randn(16, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 12, 3)
    with torch.no_grad():
        conv.weight -= conv.weight.mean((1, 2, 3), keepdim=True)
        conv.weight -= conv.weight.mean((2, 3), keepdim=True)
    network = trained_on(7 + 0.5 * noise, conv)
    found, deviation = estimate_input_statistics(capture(network, noise[:1]), noise)
    assert float(deviation) == pytest.approx(0.5, rel=0.01)
    assert found.abs().max() < 1e-3


def test_a_network_that_remembers_nothing_gets_unit_inputs():
    noise = torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    conv = nn.Conv2d(3, 12, 3, bias=False)
    nn.init.zeros_(conv.weight)
    found, deviation = estimate_input_statistics(capture(trained_on(noise, conv), noise[:1]), noise)
    assert found.tolist() == [0, 0, 0]
    assert float(deviation) == 1


def test_what_is_far_from_affine_is_not_trusted():
    """Inputs are squared before the batch norm."""

    class Squared(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward((x * x).clamp_max(2.0))

    noise = torch.randn(16, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    network = trained_on(noise, Squared(3, 12, 3))
    teacher = capture(network, noise[:1])
    found, deviation = estimate_input_statistics(teacher, noise)
    assert found.tolist() == [0, 0, 0]
    assert float(deviation) == 1


@pytest.mark.parametrize("factor", [0.0, 1e-4, 1e-3, 1e-2])
def test_filters_that_are_nearly_dead_do_not_mislead(factor):
    noise = torch.randn(16, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 12, 3)
    with torch.no_grad():
        conv.weight[:9] *= factor
    network = trained_on(0.5 * noise, conv)
    _, deviation = estimate_input_statistics(capture(network, noise[:1]), noise)
    assert float(deviation) == pytest.approx(0.5, rel=0.01)
