"""Blocks of a network and where they end."""

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from support import networks, unusual
from support.students import noise, student_of
from torch import Tensor, fx, nn

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


def through_blocks(network: fx.GraphModule, ends: Sequence[fx.Node], *inputs: Tensor) -> Tensor:
    """What the last block of a network computes, where each takes what it needs."""
    values = list(inputs)
    for block in blocks(network, ends):
        values.append(block.network(*(values[place] for place in block.takes)))
    return values[-1]


def test_blocks_in_sequence_equal_the_network(teacher: Captured, images: Tensor) -> None:
    student = student_of(teacher, images)
    folded = fold_batch_norms(teacher).network
    ends = block_ends(folded.graph)
    for network, nodes in (
        (folded, ends),
        (student.network, student.named([end.name for end in ends])),
    ):
        assert len(blocks(network, nodes)) == len(ends) + 1 > 2
        assert torch.equal(through_blocks(network, nodes, images), network(images))
    owned = {id(p) for part in blocks(student.network, nodes) for p in part.network.parameters()}
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
    assert torch.equal(through_blocks(network, block_ends(network.graph), images), network(images))


@pytest.mark.parametrize("name", ["lstm", "last states", "counts images"])
def test_blocks_take_the_device_of_new_tensors_from_their_own_input(name: str) -> None:
    """A recurrent layer starts from zeros, as many as there are images."""
    teacher = capture(unusual.make(name), torch.zeros(1, *unusual.SHAPE))
    graph = teacher.network.graph
    cut = [node for node in graph.nodes if name_of(node) == RELU]
    x = networks.images(3, shape=unusual.SHAPE)
    assert torch.equal(through_blocks(teacher.network, cut, x), teacher.network(x))


class UNet(nn.Module):
    """Residual blocks with the time step in each, and a skip from the first to the last."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1)
        self.inner = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(4))
        self.times = nn.ModuleList(nn.Linear(1, 4) for _ in range(2))
        self.join = nn.Conv2d(8, 4, 1)

    def residual(self, x: Tensor, t: Tensor, number: int) -> Tensor:
        y = F.silu(self.inner[2 * number](x) + self.times[number](t[:, None])[:, :, None, None])
        return x + self.inner[2 * number + 1](y)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        skip = self.residual(self.enter(x), t, 0)
        y = self.residual(skip, t, 1)
        return self.leave(F.silu(self.join(torch.cat([y, skip], 1))))


def test_blocks_end_across_the_skips_of_a_u_net(images: Tensor) -> None:
    torch.manual_seed(0)
    inputs = images[:2], torch.tensor([0.5, 2.0])
    captured = capture(UNet().eval(), inputs, classifier=False)
    graph = captured.network.graph
    assert [end.name for end in block_ends(graph)] == ["cat", "silu_2"]
    ends = block_ends(graph, across_skips=True)
    assert [name_of(end) for end in ends] == [
        "aten.conv2d.default", "aten.add.Tensor", "aten.add.Tensor", "aten.silu.default",
    ]  # fmt: skip
    # The time step is the second input, and the skip, the second end, is taken twice.
    takes = [block.takes for block in blocks(captured.network, ends)]
    assert takes == [(0,), (1, 2), (1, 3), (3, 4), (5,)]
    assert torch.equal(through_blocks(captured.network, ends, *inputs), captured.network(*inputs))
