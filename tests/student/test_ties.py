"""Scales on which no sum lies at a tie between two codes."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, tensor

from gdfq.graph import operators
from gdfq.student.ties import possible_results, scale_off_ties


def _distance(results: Tensor, scale: Tensor) -> float:
    """Return the least distance to a tie, in codes of 4 bits with zero point -3."""
    steps = results.double() / scale.double()
    steps = steps[(steps > -5) & (steps < 10)]
    return float((steps - steps.floor() - 0.5).abs().min()) if len(steps) else 0.5


def test_scale_moves_to_the_nearest_on_which_a_tie_is_gone() -> None:
    # 2.5 steps is a tie. At Δ (1 - k / 2^20) it is 2.5 k / 2^20 off: 1e-4 needs k = 42.
    found = scale_off_ties(tensor([2.5], dtype=torch.double), tensor(1.0), tensor(-3.0), 4)
    assert abs(float(found) - 1) * 2**20 == 42
    # Far from ties, and outside of the grid, nothing changes.
    for result in (2.25, 30.5, -7.5):
        results = tensor([result], dtype=torch.double)
        assert scale_off_ties(results, tensor(1.0), tensor(-3.0), 4) == 1


@given(
    st.lists(st.integers(-200, 200), min_size=1, max_size=40), st.floats(0.05, 5), st.integers(1, 9)
)
def test_results_keep_their_distance_or_the_largest(
    whole: list[int], scale: float, divisor: int
) -> None:
    results = tensor(whole, dtype=torch.double) * scale / (2 * divisor)
    old = tensor(scale)
    found = scale_off_ties(results, old, tensor(-3.0), 4)
    assert abs(float(found / old) - 1) <= 1e-4
    candidates = [(old.double() * (1 + k * 2.0**-20)).float() for k in range(-64, 65)]
    best = max(_distance(results, candidate) for candidate in candidates)
    assert _distance(results, found) >= min(best, 1e-4)


VALUES = {
    "x": tensor([-2.0, 0.0, 4.0]),
    "y": tensor([0.5, -3.0]),
    "slope": tensor([0.25, 0.5]),
    "many": torch.arange(2.0**16 // 3 + 1),
}


class Results:
    """A graph whose tensors have the values above, but for one of any values."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.x, self.y, self.any = map(self.graph.placeholder, ("x", "y", "any"))
        self.slope, self.many = (self.graph.create_node("get_attr", n) for n in ("slope", "many"))

    def call(self, name: str, *arguments: object, **keywords: object) -> fx.Node:
        return self.graph.call_function(operators.resolve(name), arguments, keywords)  # type: ignore[arg-type]

    def of(self, node: fx.Node) -> list[float] | None:
        found = possible_results(node, lambda n: VALUES.get(str(n.target)))
        return None if found is None else found.tolist()


def test_possible_results_of_two_tensors_are_those_of_all_pairs() -> None:
    g = Results()
    assert g.of(g.call(operators.ADD, g.x, g.y)) == [-1.5, -5, 0.5, -3, 4.5, 1]
    assert g.of(g.call(operators.ADD, g.x, g.y, alpha=2)) == [-1, -8, 1, -6, 5, -2]
    assert g.of(g.call(operators.DIFFERENCE, g.y, g.x)) == [2.5, 0.5, -3.5, -1, -3, -7]
    assert g.of(g.call(operators.DIVIDE, g.x, g.y)) == [-4, 2 / 3, 0, 0, 8, -4 / 3]
    assert g.of(g.call(operators.MAXIMUM, g.x, g.y)) == [0.5, -2, 0.5, 0, 4, 4]
    assert g.of(g.call(operators.ADD, g.x, g.any)) is None


def test_possible_results_of_one_tensor_are_those_of_all_codes() -> None:
    g = Results()
    assert g.of(g.call("aten.hardsigmoid.default", g.x)) == [1 / 6, 0.5, 1]
    assert g.of(g.call("aten.leaky_relu.default", g.x, 0.5)) == [-1, 0, 4]
    assert g.of(g.call(operators.MULTIPLY, g.x, 3)) == [-6, 0, 12]
    assert g.of(g.call(operators.ADD, g.x, g.x)) == [-4, 0, 8]
    squared = g.call(operators.POWER, g.call("aten.neg.default", g.x), 2)
    assert g.of(squared) == [4, 0, 16]
    assert g.of(g.call(operators.ADD, squared, g.x)) == [2, 0, 20]
    assert g.of(g.x) is None
    assert g.of(g.call("aten.mean.dim", g.x, [1])) is None
    assert g.of(g.call("aten.softmax.int", g.x, 1)) is None
    assert g.of(g.call("aten.neg.default", g.call("aten.flip.default", squared, [1]))) is None


def test_possible_results_with_a_constant_are_those_of_all_its_values() -> None:
    g = Results()
    assert g.of(g.call(operators.MULTIPLY, g.x, g.slope)) == [-0.5, -1, 0, 0, 1, 2]
    assert g.of(g.call("aten.prelu.default", g.x, g.slope)) == [-0.5, -1, 0, 0, 4, 4]
    assert g.of(g.call("aten.exp.default", g.slope)) is None
    assert g.of(g.call(operators.MULTIPLY, g.x, g.many)) is None  # more than a step can look at
    assert len(g.of(g.call(operators.MULTIPLY, g.y, g.many)) or ()) == 2 * len(VALUES["many"])


@pytest.mark.parametrize(
    "name",
    [
        *("abs", "celu", "cos", "elu", "erf", "exp", "gelu", "hardsigmoid", "hardswish", "log"),
        *("log1p", "log_sigmoid", "mish", "neg", "reciprocal", "rsqrt", "selu", "sigmoid", "sign"),
        *("silu", "sin", "softplus", "sqrt", "square", "tanh"),
    ],
)
def test_functions_of_one_number_have_known_results(name: str) -> None:
    g = Results()
    function = operators.resolve(f"aten.{name}.default")
    expected: Any = [pytest.approx(float(function(x)), rel=1e-6, nan_ok=True) for x in VALUES["x"]]
    assert g.of(g.call(f"aten.{name}.default", g.x)) == expected


def test_results_with_a_constant_of_whole_numbers_are_found() -> None:
    graph = fx.Graph()
    x, constant = graph.placeholder("x"), graph.get_attr("constant")
    product = graph.call_function(torch.ops.aten.mul.Tensor, (x, constant))
    values = {x: torch.tensor([0.5, 1.0, 1.5]), constant: torch.tensor([2, 3])}
    found = possible_results(product, values.get)
    assert found is not None
    assert found.tolist() == [1.0, 1.5, 2.0, 3.0, 3.0, 4.5]
