"""Wrappers around a network are taken off."""

from collections.abc import Callable

import pytest
import torch
from support import networks
from support.narrowing import instance
from torch import Tensor, nn

import gdfq
from gdfq.errors import UsageError
from gdfq.graph.capture import capture
from gdfq.graph.wrappers import unwrapped
from gdfq.plan.network import resolve_network


class Ema(nn.Module):
    """As timm's ModelEmaV2: no forward of its own."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class Doubling(nn.Module):
    """A network that holds another one under the name of a wrapper's."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: Tensor) -> Tensor:
        return 2 * self.module(images)


pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit")  # torch.compile imports what is old


def compiled(network: nn.Module) -> nn.Module:
    return instance(torch.compile(network), nn.Module)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "parallel": nn.DataParallel,
    "compiled": compiled,
    "averaged": torch.optim.swa_utils.AveragedModel,
    "ema": Ema,
    "compiled parallel": lambda network: compiled(nn.DataParallel(network)),
    "averaged compiled": lambda network: torch.optim.swa_utils.AveragedModel(compiled(network)),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrapped_network_is_captured_as_the_network(name: str) -> None:
    network = networks.make("Residual").eval()
    wrapped = WRAPPERS[name](network)
    images = networks.images(3)
    with torch.no_grad():
        expected = network(images)
        torch.testing.assert_close(capture(wrapped, images).network(images), expected)


def test_wrapper_changes_no_hash_of_the_weights() -> None:
    network = networks.make("Residual")
    plain, wrapped = (
        resolve_network(model, networks.images(1)) for model in (network, nn.DataParallel(network))
    )
    assert plain.weights_sha256 == wrapped.weights_sha256


def test_wrapper_inside_a_network_is_taken_off_its_copy() -> None:
    network = networks.make("Residual").eval()
    images = networks.images(3)
    outer = nn.Sequential(nn.DataParallel(network), nn.Identity())
    with torch.no_grad():
        expected = network(images)
        torch.testing.assert_close(capture(outer, images).network(images), expected)
    assert isinstance(outer[0], nn.DataParallel)


def test_module_with_a_forward_of_its_own_is_no_wrapper() -> None:
    network = networks.make("Residual").eval()
    doubling = Doubling(network)
    assert unwrapped(doubling) is doubling


def test_torchscript_module_is_named() -> None:
    scripted = torch.jit.trace(networks.make("Residual").eval(), networks.images(1))
    with pytest.raises(UsageError, match=r"TorchScript module.*that it was made from"):
        gdfq.capture(scripted, networks.images(1))
