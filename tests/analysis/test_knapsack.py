"""The choice of bits is optimal."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from scipy.optimize import Bounds, LinearConstraint, milp

from gdfq import UsageError
from gdfq.analysis.knapsack import allocate


@st.composite
def choices(draw: DrawFn) -> Any:
    """Costs that decrease with bits, sizes that need not increase, for a few groups; and a budget."""
    groups = draw(st.integers(1, 6))
    costs, sizes = [], []
    for _ in range(groups):
        options = (2, 4, 8)[: draw(st.integers(1, 3))]
        falling = sorted(draw(st.lists(st.integers(0, 20), min_size=3, max_size=3)), reverse=True)
        costs.append(dict(zip(options, map(float, falling), strict=False)))
        sizes.append({bits: draw(st.integers(1, 30)) for bits in options})
    return costs, sizes, draw(st.integers(1, 30 * groups))


@settings(max_examples=300, deadline=None)
@given(choices())
def test_allocate_matches_brute_force(problem: Any) -> None:
    costs, sizes, budget = problem

    def sums(chosen: Any) -> Any:
        pairs = [(c[w], s[w]) for c, s, w in zip(costs, sizes, chosen, strict=True)]
        return tuple(map(sum, zip(*pairs, strict=True)))

    every = [sums(chosen) for chosen in itertools.product(*costs)]
    fitting = [cost for cost, size in every if size <= budget]
    if not fitting:
        smallest = min(size for _, size in every)
        with pytest.raises(UsageError, match=f"smallest possible size is {smallest} bytes"):
            allocate(costs, sizes, budget)
        return
    cost, size = sums(allocate(costs, sizes, budget))
    assert size <= budget
    assert cost == min(fitting)


def test_allocate_where_everything_fits_or_nothing_does() -> None:
    costs = [{2: 1.0, 8: 1.0}, {2: 0.0, 8: 0.0}]
    sizes = [{2: 10, 8: 40}, {2: 30, 8: 20}]  # fewer bits can take more bytes in a small layer
    assert allocate(costs, sizes, 60) == [8, 8]
    assert allocate(costs, sizes, 59)[0] == 2
    with pytest.raises(UsageError, match="smallest possible size is 30 bytes; got 29"):
        allocate(costs, sizes, 29)


def test_allocate_matches_an_integer_program_for_many_layers() -> None:
    """Costs decrease like rounding errors (to a quarter for each bit); all sizes differ."""
    draw = torch.Generator().manual_seed(0)
    weights = torch.randint(10**3, 10**6, (100,), generator=draw).tolist()
    scale = torch.rand(100, generator=draw).tolist()
    costs = [{w: s * 4.0**-w for w in (2, 4, 8)} for s in scale]
    sizes = [{w: n * w // 8 + 7 for w in (2, 4, 8)} for n in weights]
    budget = sum(weights) // 2

    def total(groups: Any, chosen: Any) -> Any:
        return sum(group[w] for group, w in zip(groups, chosen, strict=True))

    chosen = allocate(costs, sizes, budget)
    assert total(sizes, chosen) <= budget
    one_each = LinearConstraint(np.kron(np.eye(100), np.ones(3)), 1, 1)
    fits = LinearConstraint([[size for group in sizes for size in group.values()]], 0, budget)
    c = [cost for group in costs for cost in group.values()]
    best = milp(
        c, integrality=1, bounds=Bounds(0, 1), constraints=[one_each, fits],
        options={"mip_rel_gap": 0},
    )  # fmt: skip
    # The integer program meets its constraints within 1e-6, so it can be slightly better.
    assert total(costs, chosen) == pytest.approx(best.fun, rel=1e-4)
