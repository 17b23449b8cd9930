"""Private copies of networks: capture changes nothing of the user's."""

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import networks, unusual
from torch import Tensor, nn

from gdfq.graph.capture import capture
from gdfq.graph.private_copy import private_copy

EXAMPLE = torch.zeros(1, *unusual.SHAPE)
KEPT: list[Tensor] = []
"""What a hook keeps in a global list."""
CALLS = {"count": 0}


def keep_globally(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
    KEPT.append(output)
    CALLS["count"] += 1


class Keeper:
    """A hook with state of its own, a lock among it."""

    def __init__(self, network: nn.Module) -> None:
        self.features: list[Tensor] = []
        self.lock = threading.Lock()
        self.network = network

    def hook(self, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        with self.lock:
            self.features.append(output)


def everything(network: nn.Module) -> dict[str, Any]:
    """What a call of a network must not change."""
    tensors = dict(network.named_parameters()) | dict(network.named_buffers())
    modules = dict(network.named_modules())
    return {
        "values": {name: tensor.detach().clone() for name, tensor in tensors.items()},
        "identities": {name: id(tensor) for name, tensor in tensors.items()},
        "gradients": {name: tensor.requires_grad for name, tensor in tensors.items()},
        "training": {name: module.training for name, module in modules.items()},
        "attributes": {name: dict(vars(module)) for name, module in modules.items()},
        "hooks": {name: list(module._forward_hooks) for name, module in modules.items()},
    }


def check_unchanged(network: nn.Module, before: dict[str, Any]) -> None:
    after = everything(network)
    for name, value in before["values"].items():
        assert torch.equal(after["values"][name], value), name
    for what in ("identities", "gradients", "training", "hooks"):
        assert after[what] == before[what]
    for name, attributes in before["attributes"].items():
        assert after["attributes"][name].keys() == attributes.keys()
        for key, value in attributes.items():
            assert after["attributes"][name][key] is value, f"{name}.{key}"


@pytest.mark.parametrize(
    "name", ["counts", "follows", "remembers", "kept features", "pruned", "weight norm", "lstm"]
)
def test_capture_leaves_the_network_as_it_is(name: str) -> None:
    network = unusual.ready(unusual.NETWORKS[name]()).train()
    network.head.eval()  # type: ignore[union-attr]
    before, random_state = everything(network), torch.get_rng_state()
    capture(network, EXAMPLE)
    check_unchanged(network, before)
    assert torch.equal(torch.get_rng_state(), random_state)


def with_global_hook() -> tuple[nn.Module, Callable[[], int]]:
    network = unusual.ready(unusual.Network())
    network.norm.register_forward_hook(keep_globally)  # type: ignore[union-attr]
    return network, lambda: len(KEPT) + CALLS["count"]


def with_closure() -> tuple[nn.Module, Callable[[], int]]:
    network, found = unusual.ready(unusual.Network()), dict[str, list[Tensor]](all=[])

    def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        found["all"].append(output)

    network.norm.register_forward_hook(hook)  # type: ignore[union-attr]
    return network, lambda: len(found["all"])


def with_object() -> tuple[nn.Module, Callable[[], int]]:
    network = unusual.ready(unusual.Network())
    keeper = Keeper(network)
    network.norm.register_forward_hook(keeper.hook)  # type: ignore[union-attr]
    return network, lambda: len(keeper.features)


def with_default() -> tuple[nn.Module, Callable[[], int]]:
    network, found = unusual.ready(unusual.Network()), list[Tensor]()

    def hook(_module: nn.Module, _inputs: Any, output: Tensor, into: list[Tensor] = found) -> None:
        into.append(output)

    network.norm.register_forward_pre_hook(lambda module, _: setattr(module, "seen", 1))  # type: ignore[union-attr]
    network.norm.register_forward_hook(hook)  # type: ignore[union-attr]
    return network, lambda: len(found)


@pytest.mark.parametrize("make", [with_global_hook, with_closure, with_object, with_default])
def test_hooks_keep_nothing_of_a_capture(
    make: Callable[[], tuple[nn.Module, Callable[[], int]]],
) -> None:
    network, kept = make()
    network(EXAMPLE)
    count = kept()
    assert count > 0
    captured = capture(network, EXAMPLE)
    assert kept() == count
    x = networks.images(3, shape=unusual.SHAPE)
    torch.testing.assert_close(captured.network(x), network(x))


def test_hook_that_changes_an_output_is_part_of_the_network() -> None:
    network = unusual.ready(unusual.Network())
    network.norm.register_forward_hook(lambda _module, _inputs, output: 2 * output)  # type: ignore[union-attr]
    x = networks.images(3, shape=unusual.SHAPE)
    torch.testing.assert_close(capture(network, EXAMPLE).network(x), network(x))


def test_network_that_holds_locks_threads_and_files_is_captured(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as file:
        network: Any = unusual.ready(unusual.Network())
        network.lock, network.condition = threading.Lock(), threading.Condition()
        network.thread, network.file = threading.Thread(target=print), file
        network.norm.numbers = (n for n in range(3))  # a generator
        with pytest.raises(TypeError, match="pickle"):
            copy.deepcopy(network)
        x = networks.images(3, shape=unusual.SHAPE)
        torch.testing.assert_close(capture(network, EXAMPLE).network(x), network(x))


def test_functions_of_the_copy_use_the_copy() -> None:
    """A lambda that calls a layer of the network, in training mode: the copy is in evaluation."""
    network: Any = unusual.Network()
    network.drop = nn.Dropout(0.5)
    network.middle = lambda _, x: network.drop(x)
    unusual.ready(network)
    expected = network(EXAMPLE + 1)
    copied: Any = private_copy(network.train())
    torch.testing.assert_close(copied(EXAMPLE + 1), expected)
    with torch.no_grad():
        copied.conv.weight.zero_()
        copied.drop.p = 0.9
    assert network.drop.p == 0.5
    assert network.drop.training
    assert float(network.conv.weight.abs().sum().detach()) > 0


def test_copy_is_in_float32_with_one_copy_of_each_value() -> None:
    network: Any = unusual.Network()
    network.other = network.conv
    network.tensors = [network.conv.weight, torch.ones(2, dtype=torch.float16)]
    network.parent = [network]  # a list hides it from named_modules
    copied: Any = private_copy(network.double())
    assert copied.other is copied.conv
    assert copied.tensors[0] is copied.conv.weight
    assert copied.parent[0] is copied
    assert {t.dtype for t in (*copied.parameters(), *copied.tensors)} == {torch.float32}
    assert next(network.parameters()).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_network_in_another_precision_is_captured_in_float32(dtype: torch.dtype) -> None:
    def middle(network: Any, x: Tensor) -> Tensor:
        return x.to(dtype) + torch.ones(8, 1, 1, dtype=dtype) * x.new_tensor(0.5)

    def cast(_module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        return (inputs[0].to(dtype),)

    network = unusual.ready(unusual.Network()).to(dtype)
    setattr(network, "middle", middle)  # noqa: B010 (mypy takes attributes of a module for tensors)
    network.register_forward_pre_hook(cast)
    captured = capture(network, EXAMPLE)
    x = networks.images(5, shape=unusual.SHAPE)
    actual, expected = captured.network(x), network(x).float()
    assert actual.dtype == torch.float32
    assert float((actual - expected).norm().detach()) < 0.02 * float(expected.norm().detach())


def test_network_that_holds_a_graph_module_is_captured() -> None:
    """A graph module copies its own submodules."""
    inside = capture(networks.make("Residual"), networks.images(2)).network
    model = nn.Sequential(inside, nn.ReLU())
    x = networks.images(3)
    torch.testing.assert_close(capture(model, x).network(x), model(x))
