"""Questions about nodes."""

import math
from typing import Any

import pytest
import torch
from torch import fx

from gdfq.graph import queries

aten = torch.ops.aten
INFINITE = math.inf


@pytest.mark.parametrize(
    ("operator", "arguments", "keywords", "ends"),
    [
        (aten.relu.default, (), {}, (0, INFINITE)),
        (aten.relu6.default, (), {}, (0, 6)),
        (aten.hardtanh.default, (), {}, (-1, 1)),
        (aten.hardtanh.default, (0.0, 6.0), {}, (0, 6)),
        (aten.hardtanh.default, (), {"min_val": -2, "max_val": 3}, (-2, 3)),
        (aten.clamp.default, (-1.5, 4), {}, (-1.5, 4)),
        (aten.clamp.default, (), {"max": 4}, (-INFINITE, 4)),
        (aten.clamp.default, (None, 4), {}, (-INFINITE, 4)),
        (aten.clamp.default, (0,), {}, (0, INFINITE)),
        (aten.clamp_min.default, (-2,), {}, (-2, INFINITE)),
        (aten.clamp_min.default, (), {"min": -2}, (-2, INFINITE)),
        (aten.clamp_max.default, (2,), {}, (-INFINITE, 2)),
        (aten.clamp_max.default, (), {"max": 2}, (-INFINITE, 2)),
        (aten.sigmoid.default, (), {}, (-INFINITE, INFINITE)),
    ],
)
def test_value_limits_are_those_of_the_clamp(
    operator: Any, arguments: Any, keywords: Any, ends: tuple[float, float]
) -> None:
    graph = fx.Graph()
    node = graph.call_function(operator, (graph.placeholder("x"), *arguments), keywords)
    assert queries.clamp_ends(node) == ends
    assert queries.value_limits(node) == ends


def test_value_limits_leave_out_what_excludes_zero() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    above = graph.call_function(aten.clamp.default, (x, 0.2, 6.0))
    below = graph.call_function(aten.clamp.default, (x, -3.0, -0.1))
    assert queries.value_limits(above) == (-INFINITE, 6)
    assert queries.value_limits(below) == (-3, INFINITE)
    assert queries.clamp_ends(above) == (0.2, 6)
    assert queries.clamp_ends(below) == (-3, -0.1)
    assert not queries.clamps_around_zero(above)
    assert not queries.clamps_around_zero(below)


def test_value_limits_are_those_of_all_clamps_in_a_row() -> None:
    graph = fx.Graph()
    first = graph.call_function(aten.hardtanh.default, (graph.placeholder("x"), -1.0, 4.0))
    second = graph.call_function(aten.clamp_max.default, (first, 3.0))
    last = graph.call_function(aten.relu.default, (second,))
    assert queries.value_limits(second) == (-1, 3)
    assert queries.value_limits(last) == (0, 3)
    assert queries.clamps_around_zero(last)
