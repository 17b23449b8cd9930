"""Bytes of activations, counted from the graph."""

import torch
from support.narrowing import instance
from torch import Tensor, nn

from gdfq.execution.budget import MemoryBudget
from gdfq.graph.capture import capture
from gdfq.graph.memory import (
    forward_bytes,
    forward_images,
    kept_bytes,
    tensor_bytes,
    training_bytes,
)
from gdfq.graph.recompute import BudgetedNetwork
from gdfq.graph.statistics import StatisticsNetwork

CPU = torch.device("cpu")


class Chain(nn.Module):
    """[N, 1, 4] -> relu -> linear to 8 numbers -> sum with itself doubled."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(torch.relu(x))
        return torch.sigmoid(y) + y


def test_bytes_of_a_graph_match_hand_computed_values() -> None:
    # Input and ReLU have 4 numbers, linear, sigmoid and sum 8: 16, 16, 32, 32, 32 bytes. The most
    # is alive at the sum: linear, sigmoid and the sum itself. Work space is twice the largest.
    graph = capture(Chain(), torch.zeros(1, 1, 4)).network.graph
    assert sorted(tensor_bytes(graph).values()) == [16, 16, 32, 32, 32]
    assert forward_bytes(graph) == 96 + 64
    assert training_bytes(graph) == 128 + 64
    assert forward_images(graph, MemoryBudget(4 * 500), CPU) == 3


class Residual(nn.Module):
    """[N, 2, 4, 4] -> conv, norm, relu, conv, norm, plus the input."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 2, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(2)
        self.second = nn.Conv2d(2, 2, 3, padding=1, bias=False)
        self.other = nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.first(x)))
        return x + self.other(self.second(y))


def test_backward_pass_on_images_needs_the_inputs_of_norms_alone() -> None:
    # Each tensor has 32 numbers. Input and output count, too: who else holds them is not known.
    teacher = capture(Residual(), torch.zeros(1, 2, 4, 4))
    network = instance(
        StatisticsNetwork(teacher, memory=MemoryBudget())._module, BudgetedNetwork
    )._network
    needed = {node.name for node, size in kept_bytes(network.graph).items() if size >= 128}
    assert needed == {"x", "fixed_convolution", "fixed_convolution_1", "add"}
    assert len([s for s in tensor_bytes(network.graph).values() if s == 128]) == 6
