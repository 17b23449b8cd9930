"""Bytes of activations, counted from the graph."""

import torch
from torch import Tensor, nn

from gdfq.execution.budget import MemoryBudget
from gdfq.graph.capture import capture
from gdfq.graph.memory import forward_bytes, forward_images, tensor_bytes, training_bytes

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
