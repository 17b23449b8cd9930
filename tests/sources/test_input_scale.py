"""Mean and deviation of inputs, estimated from the first batch norm."""

import pytest
import torch
from support.narrowing import instance
from torch import Tensor, nn

from gdfq.graph.capture import capture
from gdfq.sources.input_scale import estimate_input_statistics


def trained_on(images: torch.Tensor, first: nn.Module) -> nn.Module:
    """A layer and a batch norm that has seen these images."""
    network = nn.Sequential(
        first, nn.BatchNorm2d(instance(first.weight, Tensor).shape[0], momentum=1.0)
    )
    network.train()(images)
    head = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4))
    return nn.Sequential(network, head).eval()


def test_input_statistics_are_estimated_from_the_first_batch_norm() -> None:
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(16, 3, 12, 12, generator=draw)
    mean = torch.tensor([0.4, -0.2, 100.0])
    seen = mean.view(3, 1, 1) + 25 * noise
    torch.manual_seed(0)
    network = trained_on(seen, nn.Conv2d(3, 12, 3, padding=1))
    found, deviation = estimate_input_statistics(capture(network, seen[:1]), noise)
    assert float(deviation) == pytest.approx(25, rel=0.01)
    assert torch.allclose(found, mean, atol=1.0)


def test_filters_of_zero_sum_leave_the_mean_at_zero() -> None:
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


def test_network_without_information_gets_unit_inputs() -> None:
    noise = torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    conv = nn.Conv2d(3, 12, 3, bias=False)
    nn.init.zeros_(conv.weight)
    found, deviation = estimate_input_statistics(capture(trained_on(noise, conv), noise[:1]), noise)
    assert found.tolist() == [0, 0, 0]
    assert float(deviation) == 1


def test_nonlinear_stem_is_not_trusted() -> None:
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
def test_nearly_dead_filters_do_not_change_the_estimate(factor: float) -> None:
    noise = torch.randn(16, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 12, 3)
    with torch.no_grad():
        conv.weight[:9] *= factor
    network = trained_on(0.5 * noise, conv)
    _, deviation = estimate_input_statistics(capture(network, noise[:1]), noise)
    assert float(deviation) == pytest.approx(0.5, rel=0.01)
