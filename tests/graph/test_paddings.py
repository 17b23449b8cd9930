"""Convolutions pad themselves where a node before them pads both ends of each axis alike."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdfq.graph import operators
from gdfq.graph.capture import Captured, capture


class PaddedFirst(nn.Module):
    """Pads, then convolves with a padding of its own, then classifies."""

    def __init__(
        self, ends: tuple[int, ...], mode: str = "constant", value: float = 0.0, own: int = 1
    ) -> None:
        super().__init__()
        self.ends, self.mode, self.value = ends, mode, value
        self.convolution = nn.Conv2d(4, 6, 3, stride=2, padding=own, groups=2)
        self.head = nn.Linear(6, 3)

    def padded(self, x: Tensor) -> Tensor:
        value = self.value if self.mode == "constant" else None
        return F.pad(x, self.ends, self.mode, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.convolution(self.padded(x)).mean((2, 3)))


class PaddedForTwo(PaddedFirst):
    """The padded tensor has a second reader, which is no convolution."""

    def forward(self, x: Tensor) -> Tensor:
        padded = self.padded(x)
        return self.head(self.convolution(padded).mean((2, 3))) + padded.amax((1, 2, 3))[:, None]


class Sequence(nn.Module):
    """A padding in front of a convolution over one axis without a bias, whose arguments are few."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(4, 6, 3, bias=False)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.convolution(F.pad(x, (2, 2))).mean(2))


def captured(model: nn.Module, *shape: int) -> Captured:
    images = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    found = capture(model.eval(), images[:1])
    with torch.no_grad():
        assert torch.allclose(found.network(images), model(images), atol=1e-6)
    return found


def paddings(network: Captured) -> int:
    return sum(operators.name_of(node) in operators.PADS for node in network.network.graph.nodes)


@pytest.mark.parametrize("ends", [(1, 1, 1, 1), (2, 2, 1, 1), (3, 3)])
def test_convolution_takes_over_a_symmetric_padding(ends: tuple[int, ...]) -> None:
    assert paddings(captured(PaddedFirst(ends), 4, 9, 8)) == 0


def test_convolution_over_one_axis_takes_over_its_padding() -> None:
    assert paddings(captured(Sequence(), 4, 9)) == 0


@pytest.mark.parametrize(
    "model",
    [
        PaddedFirst((0, 1, 0, 1)),
        PaddedFirst((1, 1, 1, 1), value=0.5),
        PaddedFirst((1, 1, 1, 1), "reflect"),
        PaddedFirst((-1, -1, -1, -1)),
    ],
    ids=["one-sided", "not zero", "reflected", "cropped"],
)
def test_other_paddings_stay(model: nn.Module) -> None:
    found = captured(model, 4, 9, 8)
    names = [operators.name_of(node) for node in found.network.graph.nodes]
    assert len([name for name in names if "pad" in name]) == 1


def test_padding_with_another_reader_stays_for_it() -> None:
    found = captured(PaddedForTwo((1, 1, 1, 1)), 4, 9, 8)
    (convolution,) = (
        node
        for node in found.network.graph.nodes
        if operators.name_of(node) in operators.CONVOLUTIONS
    )
    assert paddings(found) == 1
    assert operators.name_of(convolution.all_input_nodes[0]) not in operators.PADS
