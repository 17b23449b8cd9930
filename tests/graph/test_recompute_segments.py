"""Networks whose activations are recomputed segment by segment."""

import pytest
import torch
from support import networks
from support.narrowing import instance
from torch import Tensor

from gdfq.execution.budget import MemoryBudget
from gdfq.functional.losses import relative_statistics_loss
from gdfq.graph.capture import Captured
from gdfq.graph.memory import tensor_bytes, training_bytes
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
    assert recomputed_segments(parts, sizes, sizes, 2.0**40) == frozenset()
    assert recomputed_segments(parts, sizes, sizes, 0) == frozenset(range(len(parts)))


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
