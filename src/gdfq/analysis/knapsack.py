"""The multiple-choice knapsack: one option of each group, at least cost, within a budget."""

from collections.abc import Mapping, Sequence

import numpy as np

from gdfq.errors import UsageError

_BISECTIONS = 100
_SLACK = 1e-9
"""Relative; a bound that rounding brought this near is not a bound."""


def allocate(
    costs: Sequence[Mapping[int, float]], sizes: Sequence[Mapping[int, int]], budget: int
) -> list[int]:
    """The option of each group whose costs have the least sum, with a sum of sizes <= `budget`.

    costs, sizes: of each group's options (widths in bits, say). Exact: groups are added one by
    one to all partial choices of which none is both larger and costlier than another, and which
    could still become the best by the bound of the Lagrangian relaxation
    Σ min(cost + λ size) − λ budget, whose own choice is where the search starts. Where they fit,
    each group gets its greatest option, which so must cost no more than the others.

    Raises UsageError, which names the smallest sum, when nothing fits.
    """
    check_budget(sizes, budget)
    greatest = [max(group) for group in sizes]
    if sum(group[option] for group, option in zip(sizes, greatest, strict=True)) <= budget:
        return greatest
    options = [sorted(group) for group in costs]
    cost = [
        np.array([group[o] for o in known]) for group, known in zip(costs, options, strict=True)
    ]
    size = [
        np.array([group[o] for o in known]) for group, known in zip(sizes, options, strict=True)
    ]
    price, most = _relaxed(cost, size, budget)
    # least[i]: the least cost + price · size of the groups from i on.
    each = [float((c + price * s).min()) for c, s in zip(cost, size, strict=True)]
    least = np.cumsum([0.0, *each[::-1]])[::-1]
    most += _SLACK * (abs(most) + sum(float(np.abs(c).max()) for c in cost))
    room = budget - np.cumsum([0, *(int(s.min()) for s in size[::-1])])[::-1]
    sums, totals = np.zeros(1), np.zeros(1, dtype=np.int64)
    trail: list[tuple[np.ndarray, np.ndarray]] = []
    for i, (c, s) in enumerate(zip(cost, size, strict=True)):
        parents = np.tile(np.arange(len(sums)), len(c))
        taken = np.repeat(np.arange(len(c)), len(sums))
        sums, totals = sums[parents] + c[taken], totals[parents] + s[taken]
        bound = sums + price * (totals - budget) + least[i + 1]
        alive = np.flatnonzero((bound <= most) & (totals <= room[i + 1]))
        alive = alive[np.lexsort((sums[alive], totals[alive]))]
        before = np.minimum.accumulate(np.concatenate([[np.inf], sums[alive][:-1]]))
        alive = alive[sums[alive] < before]
        trail.append((parents[alive], taken[alive]))
        sums, totals = sums[alive], totals[alive]
    best = int(sums.argmin())
    chosen = []
    for (parents, taken), known in zip(reversed(trail), reversed(options), strict=True):
        chosen.append(known[taken[best]])
        best = int(parents[best])
    return chosen[::-1]


def check_budget(sizes: Sequence[Mapping[int, int]], budget: int) -> None:
    """Raise UsageError, which names the smallest sum, when no choice fits."""
    smallest = sum(min(group.values()) for group in sizes)
    if smallest > budget:
        raise UsageError(
            f"the smallest possible size is {smallest} bytes; got {budget}. Ask for that or more."
        )


def _relaxed(
    cost: Sequence[np.ndarray], size: Sequence[np.ndarray], budget: int
) -> tuple[float, float]:
    """A price per byte at which the cheapest options fit the budget, and what they cost."""

    def choice(price: float) -> tuple[int, float]:
        # Of equally good options the smallest.
        picks = [np.lexsort((s, c + price * s))[0] for c, s in zip(cost, size, strict=True)]
        total = sum(int(s[pick]) for s, pick in zip(size, picks, strict=True))
        return total, sum(float(c[pick]) for c, pick in zip(cost, picks, strict=True))

    low, high = 0.0, 1.0
    while choice(high)[0] > budget:
        high *= 2
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if choice(middle)[0] > budget else (low, middle)
    return high, choice(high)[1]
