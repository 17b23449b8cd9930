"""A module that is tested, between convolutions, so that it reads and writes activations."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdfq.graph.capture import Captured, capture


class _Around(nn.Module):
    """Convolutions around a module that takes maps of 8 channels; 5 outputs."""

    def __init__(self, inner: nn.Module, channels: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, 8, 3, padding=1)
        self.inner = inner
        self.head = nn.LazyConv2d(6, 1)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(self.inner(F.relu(self.stem(x))))
        return self.fc(F.relu(x).mean((2, 3)))


class _Between(nn.Module):
    """A module that takes maps of 8 channels, between two convolutions."""

    def __init__(self, inner: nn.Module, channels: int) -> None:
        super().__init__()
        self.stem, self.inner = nn.Conv2d(channels, 8, 3, padding=1), inner
        self.head = nn.LazyConv2d(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(F.relu(self.stem(x))))


class _Beside(nn.Module):
    """Modules side by side, each between two convolutions of its own; an output for each."""

    def __init__(self, inner: Mapping[str, nn.Module], channels: int) -> None:
        super().__init__()
        self.kinds = nn.ModuleDict({name: _Between(one, channels) for name, one in inner.items()})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {name: kind(x) for name, kind in self.kinds.items()}


class Of(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def surrounded(inner: nn.Module, shape: tuple[int, ...]) -> Captured:
    """A module between convolutions, of images of a shape."""
    return teacher_of(_Around(inner, shape[0]), shape)


def surrounded_each(inner: Mapping[str, nn.Module], shape: tuple[int, ...]) -> Captured:
    """Modules by name, side by side, each between two convolutions; outputs have their names."""
    return teacher_of(_Beside(inner, shape[0]), shape)


def teacher_of(network: nn.Module, shape: tuple[int, ...]) -> Captured:
    """A network with random weights, as `capture` returns it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network.eval()(torch.zeros(1, *shape))  # lazy layers take their shape
        for parameter in network.parameters():
            nn.init.normal_(parameter, 0, 0.5 / max(1, parameter[0].numel()) ** 0.5)
    return capture(network, torch.zeros(1, *shape))
