"""Networks with state, computed weights, other precisions and rare operators are captured."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import networks, unusual
from support.choice import every_second
from torch import Tensor, nn

from gdfq import UsageError
from gdfq.graph import operators, queries
from gdfq.graph.capture import Captured, capture
from gdfq.graph.statistics import StatisticsNetwork

EXAMPLE = torch.zeros(1, *unusual.SHAPE)
ROUNDING = {"half inside": 2e-3, "bfloat16 inside": 1e-2, "autocast": 1e-2}
"""Errors of networks that compute in another precision; the captured one does in float32."""
FLOAT32 = 1e-5


@pytest.mark.parametrize("name", every_second(unusual.NETWORKS))
def test_unusual_network_equals_its_module_for_any_batch_size(name: str) -> None:
    module = unusual.make(name)
    captured = capture(module, EXAMPLE)
    assert captured.classes == unusual.CLASSES
    for count in (1, 3, 17):
        x = networks.images(count, seed=count, shape=unusual.SHAPE)
        with torch.no_grad():
            expected = module(x)
        error = (captured.network(x) - expected).norm() / expected.norm()
        assert float(error) < ROUNDING.get(name, FLOAT32)


def operators_of(captured: Captured) -> set[str]:
    return {operators.short_name(node) for node in captured.network.graph.nodes} - {""}


@pytest.mark.parametrize("name", ["writes", "fills", "shifts"])
def test_writes_in_place_become_concatenations(name: str) -> None:
    found = operators_of(capture(unusual.make(name), EXAMPLE))
    assert "cat" in found
    assert not found & {"slice_scatter", "select_scatter", "index_put", "copy", "copy_", "fill"}


def test_filled_buffer_is_the_concatenation_of_its_parts() -> None:
    class Halves(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = torch.empty(x.shape[0], 6, 8, 8)
            y[:, :3] = x
            y[:, 3:] = 2 * x
            return y

    captured = capture(Halves(), EXAMPLE)
    assert operators_of(captured) == {"mul", "cat"}


@pytest.mark.parametrize("name", ["counts", "follows", "typed", "remembers"])
def test_nothing_is_left_of_counters_and_typed_constants(name: str) -> None:
    found = operators_of(capture(unusual.make(name), EXAMPLE))
    assert found <= {"conv2d", "batch_norm", "relu", "add", "mul", "mean", "linear"}


def test_network_that_remembers_a_shape_is_captured_after_any_call() -> None:
    for count in (1, 2, 7):
        network = unusual.ready(unusual.NETWORKS["remembers"]())
        x = networks.images(count, shape=unusual.SHAPE)
        network(x)
        torch.testing.assert_close(capture(network, EXAMPLE).network(x), network(x))


def test_output_that_depends_on_calls_is_refused_by_the_name_of_the_buffer() -> None:
    def middle(network: Any, x: Tensor) -> Tensor:
        network.calls += 1
        return x * network.calls

    network = unusual.ready(unusual.Network(middle, calls=torch.ones(1), other=torch.ones(1)))
    with pytest.raises(UsageError, match="a call changes calls, on which its output depends"):
        capture(network, EXAMPLE)


def test_queue_that_is_read_before_it_changes_is_refused_by_its_name() -> None:
    def middle(network: Any, x: Tensor) -> Tensor:
        shift = network.queue.mean()
        network.queue[:1] = x.mean((2, 3))[:1]
        return x + shift

    network = unusual.ready(unusual.Network(middle, queue=torch.ones(4, 8)))
    with pytest.raises(UsageError, match="a call changes queue"):
        capture(network, EXAMPLE)


def test_generator_of_random_numbers_is_refused() -> None:
    draw = torch.Generator()
    network = unusual.ready(unusual.Network(lambda _, x: x + torch.rand(8, 1, 1, generator=draw)))
    with pytest.raises(UsageError, match="no random numbers; this one uses a Generator"):
        capture(network, EXAMPLE)


class ByCount(nn.Module):
    """A batch of one image is treated in another way than other batches."""

    def __init__(self, alone: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fc, self.alone = nn.Linear(192, 5), alone

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x.flatten(1))
        return self.alone(x) if x.shape[0] == 1 else x


@pytest.mark.parametrize("alone", [lambda x: 2 * x, lambda x: x[:, :1]])
def test_output_that_depends_on_the_number_of_images_is_refused(
    alone: Callable[[Tensor], Tensor],
) -> None:
    with pytest.raises(UsageError, match=r"must not depend on the number of entries.*with 1 this"):
        capture(ByCount(alone).eval(), EXAMPLE)


def test_exponent_that_is_a_parameter_stays_as_it_is() -> None:
    captured = capture(unusual.make("generalized mean"), EXAMPLE)
    exponents = [
        node.args[1]
        for node in captured.network.graph.nodes
        if operators.name_of(node) == operators.POWER
    ]
    assert exponents == [3.0, pytest.approx(1 / 3)]


def test_layers_of_parametrized_weights_have_the_names_of_their_modules() -> None:
    for name in ("weight norm", "weight norm as parametrization", "pruned", "spectral norm"):
        captured = capture(unusual.make(name), EXAMPLE)
        layers = filter(queries.has_weight, captured.network.graph.nodes)
        assert [queries.layer_name(layer) for layer in layers] == ["conv", "head"], name


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_projected_lstm_is_refused_by_the_name_of_its_module() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.reads = nn.LSTM(3, 8, 2, batch_first=True, bidirectional=True, proj_size=4)

        def forward(self, x: Tensor) -> Tensor:
            return self.reads(x.mean(2).transpose(1, 2))[0].mean(1)

    with pytest.raises(UsageError, match=r"must not project its state.*module 'reads' does"):
        capture(Reads().eval(), EXAMPLE)


def test_unknown_operator_is_refused_by_the_name_of_its_module() -> None:
    class Bessel(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.bessel_j0(x)

    network = unusual.ready(unusual.Network(lambda n, x: n.act(x), act=nn.Sequential(Bessel())))
    with pytest.raises(UsageError, match=r"special_bessel_j0.default in module 'act\.0'"):
        capture(network, EXAMPLE)


def test_images_for_batch_norms_without_statistics_are_refused_by_their_reason() -> None:
    norm = nn.BatchNorm2d(8, track_running_stats=False)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(288, 5))
    teacher = capture(network.eval(), EXAMPLE)
    with pytest.raises(UsageError, match=r"keep none .track_running_stats=False"):
        StatisticsNetwork(teacher)


@pytest.mark.parametrize("batch", [2, 5])
def test_batch_norm_without_statistics_normalises_the_batch(batch: int) -> None:
    for norm in (
        nn.BatchNorm1d(6, track_running_stats=False),
        nn.BatchNorm1d(6, track_running_stats=False, affine=False),
    ):
        network = nn.Sequential(nn.Flatten(), nn.Linear(192, 6), norm).eval()
        captured = capture(network, EXAMPLE)
        x = networks.images(batch, shape=unusual.SHAPE)
        torch.testing.assert_close(captured.network(x), network(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("squeeze", "shape"),
    [
        (lambda y: y[:, :, None].squeeze(), (5,)),
        (lambda y: y[:, :1].squeeze(), ()),
        (lambda y: y[:, :1].squeeze(1), ()),
        (lambda y: y.squeeze(0), (5,)),
        (lambda y: y[..., None].squeeze(dim=(0, 2)), (5,)),
        (lambda y: y[None].squeeze(0), (5,)),
    ],
)
def test_batch_of_one_keeps_its_dimension(
    squeeze: Callable[[Tensor], Tensor], shape: tuple[int, ...]
) -> None:
    class Squeezes(unusual.Network):
        def forward(self, x: Tensor) -> Tensor:
            return squeeze(super().forward(x))

    network = unusual.ready(Squeezes())
    captured = capture(network, EXAMPLE)
    for count in (1, 2, 5):
        x = networks.images(count, seed=count, shape=unusual.SHAPE)
        found = captured.network(x)
        assert found.shape == (count, *shape)
        torch.testing.assert_close(found, network(x).view(found.shape))
