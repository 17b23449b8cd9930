"""Scales on which no sum lies at a tie between two codes."""

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


def test_possible_results_are_those_of_all_pairs() -> None:
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    first, second = tensor([1.0, 2.0]), tensor([0.5, -3.0])

    def results(name: str, *arguments: object, **keywords: object) -> list[float] | None:
        node = graph.call_function(operators.resolve(name), (x, y, *arguments), keywords)  # type: ignore[arg-type]
        found = possible_results(node, first, second)
        return None if found is None else found.tolist()

    assert results(operators.ADD) == [1.5, -2, 2.5, -1]
    assert results(operators.DIFFERENCE) == [0.5, 4, 1.5, 5]
    assert results(operators.MULTIPLY) == [0.5, -3, 1, -6]
    assert results(operators.ADD, alpha=2) is None
    assert results(operators.DIVIDE) is None


def test_possible_results_of_a_function_are_those_of_all_codes() -> None:
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")

    def results(name: str, *arguments: object) -> list[float] | None:
        node = graph.call_function(operators.resolve(name), arguments)  # type: ignore[arg-type]
        found = possible_results(node, tensor([-2.0, 0.0, 4.0]))
        return None if found is None else found.tolist()

    assert results("aten.hardsigmoid.default", x) == [1 / 6, 0.5, 1]
    assert results("aten.leaky_relu.default", x, 0.5) == [-1, 0, 4]
    assert results(operators.MULTIPLY, x, 3) == [-6, 0, 12]
    assert results("aten.relu.default", x) is None
    assert results("aten.mean.dim", x, [1]) is None
    assert results(operators.ADD, x, y) is None
    assert results(operators.ADD, x, x) is None
