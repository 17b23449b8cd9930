"""Blocks of a network and where they end."""

import pytest
import torch
import torch.nn.functional as F
from support import networks, unusual
from support.students import noise, student_of
from torch import Tensor, nn

from gdfq.graph.batch_norms import fold_batch_norms
from gdfq.graph.blocks import block_ends, blocks, with_features
from gdfq.graph.capture import Captured, capture
from gdfq.graph.operators import RELU, name_of


def test_block_ends_are_those_of_a_residual_network() -> None:
    folded = fold_batch_norms(networks.captured("Residual"))
    ends = block_ends(folded.network.graph)
    # Not the branch inside the block, not the pooled tensor.
    assert [node.name for node in ends] == ["relu", "relu_1"]
    logits, features = with_features(folded.network, ends)(networks.images(4))
    assert torch.equal(logits, folded.network(networks.images(4)))
    pooled = F.avg_pool2d(features[1], features[1].shape[-1]).flatten(1)
    head = folded.network.get_parameter("fc.weight"), folded.network.get_parameter("fc.bias")
    assert torch.allclose(F.linear(pooled, *head), logits, atol=1e-5)


def test_network_of_one_layer_has_no_block_ends() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).eval()
    graph = capture(network, torch.randn(2, 3, 2, 2)).network.graph
    assert block_ends(graph) == []
    assert any(name_of(node) == "aten.linear.default" for node in graph.nodes)


@pytest.fixture
def images() -> Tensor:
    return noise()


def test_blocks_in_sequence_equal_the_network(teacher: Captured, images: Tensor) -> None:
    student = student_of(teacher, images)
    folded = fold_batch_norms(teacher).network
    ends = block_ends(folded.graph)
    for network, nodes in (
        (folded, ends),
        (student.network, student.named([end.name for end in ends])),
    ):
        parts = blocks(network, nodes)
        assert len(parts) == len(ends) + 1 > 2
        x = images
        for part in parts:
            x = part(x)
        assert torch.equal(x, network(images))
    owned = {id(p) for part in blocks(student.network, nodes) for p in part.parameters()}
    assert owned == {id(p) for p in student.parameters()}  # shared, none lost


class Masked(nn.Module):
    """A mask of the input that is used behind the first block."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(2))
        self.head = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        mask = x > 0
        y = F.relu(self.second(F.relu(self.first(x))))
        return self.head(torch.where(mask, y, torch.zeros_like(y)).mean((2, 3)))


def test_blocks_do_not_end_while_a_mask_is_alive(images: Tensor) -> None:
    torch.manual_seed(0)
    network = capture(Masked().eval(), images[:2]).network
    x = images
    for part in blocks(network, block_ends(network.graph)):
        x = part(x)
    assert torch.equal(x, network(images))


@pytest.mark.parametrize("name", ["lstm", "last states", "counts images"])
def test_blocks_take_the_device_of_new_tensors_from_their_own_input(name: str) -> None:
    """A recurrent layer starts from zeros, as many as there are images."""
    teacher = capture(unusual.make(name), torch.zeros(1, *unusual.SHAPE))
    graph = teacher.network.graph
    cut = [node for node in graph.nodes if name_of(node) == RELU]
    x = networks.images(3, shape=unusual.SHAPE)
    expected = teacher.network(x)
    for block in blocks(teacher.network, cut):
        x = block(x)
    assert torch.equal(x, expected)
