"""Batch norms that networks write as arithmetic."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import networks
from support.choice import every_second
from torch import Tensor, nn

from gdfq.graph.batch_norms import batch_norm_of, fold_batch_norms
from gdfq.graph.capture import Captured, capture

SHAPE = (3, 8, 8)
Form = Callable[[Any, Tensor], Tensor]


def column(vector: Tensor) -> Tensor:
    return vector.view(1, -1, 1, 1)


def as_torchvision(norm: Any, x: Tensor) -> Tensor:
    w, b, v, m = map(column, (norm.weight, norm.bias, norm.running_var, norm.running_mean))
    scale = w * (v + norm.eps).rsqrt()
    return x * scale + (b - m * scale)


def as_detectron(norm: Any, x: Tensor) -> Tensor:
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    bias = norm.bias - norm.running_mean * scale
    return x * scale.reshape(1, -1, 1, 1).to(x.dtype) + bias.reshape(1, -1, 1, 1).to(x.dtype)


def centred(norm: Any, x: Tensor) -> Tensor:
    x = (x - column(norm.running_mean)) / torch.sqrt(column(norm.running_var) + norm.eps)
    return x * column(norm.weight) + column(norm.bias)


def as_sum(norm: Any, x: Tensor) -> Tensor:
    scale = column(norm.weight / (norm.running_var + norm.eps) ** 0.5)
    return torch.addcmul(column(norm.bias) - column(norm.running_mean) * scale, x, scale)


def without_affine(norm: Any, x: Tensor) -> Tensor:
    return (x - column(norm.running_mean)) * column((norm.running_var + norm.eps).rsqrt())


def added_first(norm: Any, x: Tensor) -> Tensor:
    scale = column(norm.weight * torch.rsqrt(norm.running_var + norm.eps))
    return (column(norm.bias) - column(norm.running_mean) * scale) + scale * x


class Frozen(nn.Module):
    """A batch norm in evaluation mode, in some form."""

    def __init__(self, norm: nn.BatchNorm2d, form: Form) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, getattr(norm, name).detach().clone())
        self.eps, self.form = norm.eps, form

    def forward(self, x: Tensor) -> Tensor:
        return self.form(self, x)


def frozen(form: Form, eps: float = 1e-5) -> tuple[nn.Module, nn.BatchNorm2d]:
    """A network with a frozen batch norm, and the batch norm."""
    draw = torch.Generator().manual_seed(0)
    norm = nn.BatchNorm2d(6, eps=eps)
    with torch.no_grad():
        for tensor, low, high in (
            *((norm.weight, -1.5, 1.5), (norm.bias, -0.5, 0.5)),
            *((norm.running_mean, -1.0, 1.0), (norm.running_var, 0.01, 2.0)),
        ):
            assert tensor is not None
            tensor.uniform_(low, high, generator=draw)
    parts = (nn.Conv2d(3, 6, 3), Frozen(norm, form), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(6, 4)).eval(), norm.eval()


def captured(network: nn.Module) -> Captured:
    found = capture(network, torch.zeros(1, *SHAPE))
    x = networks.images(3, shape=SHAPE)
    with torch.no_grad():
        torch.testing.assert_close(found.network(x), network(x), rtol=1e-4, atol=1e-5)
    return found


@pytest.mark.parametrize("eps", every_second([1e-5, 1e-3]))
@pytest.mark.parametrize(
    "form", [as_torchvision, as_detectron, centred, as_sum, without_affine, added_first]
)
def test_frozen_batch_norm_is_recognised_with_its_statistics(form: Form, eps: float) -> None:
    network, norm = frozen(form, eps)
    teacher = captured(network)
    (node,) = teacher.batch_norms
    found = batch_norm_of(teacher, node)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert torch.equal(found.mean, norm.running_mean)
    assert torch.equal(found.variance, norm.running_var)
    assert found.eps == eps
    if form is without_affine:
        assert not found.affine
    else:
        assert torch.equal(found.weight, norm.weight)
        assert torch.equal(found.bias, norm.bias)
    assert not fold_batch_norms(teacher).batch_norms


def test_frozen_batch_norm_without_epsilon_is_recognised() -> None:
    """As in maskrcnn-benchmark."""
    network, _ = frozen(as_detectron, eps=0.0)
    (node,) = captured(network).batch_norms
    assert node.args[7] == 0.0


def scaled(norm: Any, x: Tensor) -> Tensor:
    return x * column(norm.weight) + column(norm.bias)


def of_root(norm: Any, x: Tensor) -> Tensor:
    """The scale is a root, but the shift is not that of a batch norm."""
    return x * column((norm.running_var + norm.eps).rsqrt()) + column(norm.bias + norm.running_mean)


def of_deviation(norm: Any, x: Tensor) -> Tensor:
    """ε is added to the standard deviation, which no batch norm does."""
    return (x - column(norm.running_mean)) / column(norm.running_var.sqrt() + 0.05)


@pytest.mark.parametrize("form", [scaled, of_root, of_deviation])
def test_other_arithmetic_of_channels_is_no_batch_norm(form: Form) -> None:
    assert not captured(frozen(form)[0]).batch_norms


def test_scale_of_ones_is_no_batch_norm() -> None:
    network, _ = frozen(scaled)
    for tensor, value in (
        (network.get_buffer("1.weight"), 1.0),
        (network.get_buffer("1.bias"), 0.0),
    ):
        tensor.fill_(value)
    assert not captured(network).batch_norms
