"""Networks whose activations are recomputed segment by segment."""

import pytest
import torch
from support import networks
from support.narrowing import instance
from torch import Tensor, nn

from gdfq.execution.budget import MemoryBudget
from gdfq.functional.losses import relative_statistics_loss
from gdfq.graph.capture import Captured, capture
from gdfq.graph.memory import gradient_bytes, tensor_bytes, training_bytes
from gdfq.graph.recompute import BudgetedNetwork, recomputed_segments, segments
from gdfq.graph.statistics import StatisticsNetwork, unit_input

CPU = torch.device("cpu")


def gradient_of(network: StatisticsNetwork, images: Tensor) -> Tensor:
    images = images.clone().requires_grad_()
    _, observed = network(images)
    stored = network.stored
    (grad,) = torch.autograd.grad(relative_statistics_loss(observed, stored), images)
    return grad


@pytest.mark.parametrize("share", [0.2, 0.4, 0.6])
def test_recomputed_statistics_have_the_same_gradient(teacher: Captured, share: float) -> None:
    images = networks.images(6)
    unit = unit_input(teacher)
    plain = StatisticsNetwork(teacher, of_input=unit)
    needed = training_bytes(teacher.network.graph) * len(images)
    budget = MemoryBudget(int(share * needed))
    budgeted = StatisticsNetwork(teacher, of_input=unit, memory=budget)
    assert torch.equal(gradient_of(plain, images), gradient_of(budgeted, images))
    assert instance(
        budgeted._module, BudgetedNetwork
    )._by_count  # it was indeed computed in segments


def test_batch_that_fits_is_not_recomputed(teacher: Captured) -> None:
    network = BudgetedNetwork(teacher.network, [], MemoryBudget(), CPU)
    assert torch.equal(network(networks.images(3)), teacher.network(networks.images(3)))
    assert not network._by_count


def test_segments_contain_every_node_once(teacher: Captured) -> None:
    graph = teacher.network.graph
    computed = [node for node in graph.nodes if node.op == "call_function"]
    parts = segments(graph, computed[::3])
    assert [node for part in parts for node in part.nodes] == computed
    sizes = tensor_bytes(graph)
    none, needed = recomputed_segments(parts, sizes, sizes, 2.0**40)
    assert none == frozenset()
    assert needed == sum(sizes.get(node, 0) for node in computed) + gradient_bytes(sizes)


class Chain(nn.Module):
    """[N, 4, 8, 8] -> eight times a convolution, a batch norm and a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        for i in range(8):
            self.add_module(f"conv{i}", nn.Conv2d(4, 4, 1, bias=False))
            self.add_module(f"norm{i}", nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        for i in range(8):
            x = torch.relu(getattr(self, f"norm{i}")(getattr(self, f"conv{i}")(x)))
        return x.mean((2, 3))


def test_segments_are_computed_again_only_where_less_is_held() -> None:
    """Each layer of a chain keeps the input of its norm: a layer alone gains nothing, four do."""
    images = torch.randn(2, 4, 8, 8)
    teacher = capture(Chain(), images)
    budgeted = instance(StatisticsNetwork(teacher, memory=MemoryBudget())._module, BudgetedNetwork)
    graph, sizes, kept = budgeted._network.graph, budgeted._sizes, budgeted._kept
    ends = [node for node in graph.nodes if node in budgeted._ends]
    one = 4 * 4 * 8 * 8  # bytes of a feature map
    by_layer = segments(graph, ends)
    chosen, needed_by_layer = recomputed_segments(by_layer, sizes, kept, 0)
    assert chosen <= {7}  # the mean keeps its input, too
    by_four = segments(graph, ends[3::4])
    chosen, needed = recomputed_segments(by_four, sizes, kept, 0)
    # Two inputs are held, the inputs of four norms and of the mean, and two gradients.
    assert chosen == {0, 1}
    assert needed == pytest.approx((2 + 5 + 2) * one, abs=400)
    assert needed < needed_by_layer


def test_autograd_holds_no_more_than_is_counted(any_teacher: Captured) -> None:
    """At most: where images are optimised, many feature maps are not held."""
    count = 4
    network = StatisticsNetwork(any_teacher, memory=MemoryBudget(2**40))
    budgeted = instance(network._module, BudgetedNetwork)
    held: dict[int, int] = {}

    def hold(tensor: Tensor) -> Tensor:
        if tensor.ndim > 1 and len(tensor) == count:
            storage = tensor.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        images = networks.images(count).requires_grad_()
        kept = network(images)
    assert kept
    counted = count * sum(budgeted._kept.values())
    assert sum(held.values()) <= counted <= count * sum(budgeted._sizes.values())
