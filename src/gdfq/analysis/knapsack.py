"""The multiple-choice knapsack: one option of each group, least total cost, within a budget."""

from collections.abc import Mapping, Sequence

import numpy as np

from gdfq.errors import UsageError

_BISECTION_STEPS = 100
_RELATIVE_SLACK = 1e-9
"""A bound is loosened by this share, so that rounding errors exclude no option."""


def allocate(
    costs: Sequence[Mapping[int, float]], sizes: Sequence[Mapping[int, int]], budget: int
) -> list[int]:
    """Choose one option of each group with the least total cost and total size <= `budget`.

    The result is exact. Groups are added one by one to a list of partial choices. A partial choice
    stays in the list if no other is both smaller and cheaper, and if it can still become the best
    by the lower bound of the Lagrangian relaxation, Σ min(cost + λ size) − λ budget. The choice of
    the relaxation itself is the first upper bound.

    Args:
        costs: The cost of each option by group. The largest option of a group must not cost more
            than the others, because each group gets its largest option where all of these fit.
        sizes: The size of each option by group.
        budget: Largest total size.

    Returns:
        The chosen option of each group.

    Raises:
        UsageError: No choice fits; the message gives the smallest total size.
    """
    check_budget(sizes, budget)
    largest = [max(group) for group in sizes]
    if sum(group[option] for group, option in zip(sizes, largest, strict=True)) <= budget:
        return largest
    options = [sorted(group) for group in costs]
    cost = [
        np.array([group[o] for o in ordered]) for group, ordered in zip(costs, options, strict=True)
    ]
    size = [
        np.array([group[o] for o in ordered]) for group, ordered in zip(sizes, options, strict=True)
    ]
    price, upper_bound = _relaxed(cost, size, budget)
    # least[i]: the least Σ cost + price · size of the groups i, i + 1, ...
    each = [float((c + price * s).min()) for c, s in zip(cost, size, strict=True)]
    least = np.cumsum([0.0, *each[::-1]])[::-1]
    upper_bound += _RELATIVE_SLACK * (abs(upper_bound) + sum(float(np.abs(c).max()) for c in cost))
    room = budget - np.cumsum([0, *(int(s.min()) for s in size[::-1])])[::-1]
    sums, totals = np.zeros(1), np.zeros(1, dtype=np.int64)
    trail: list[tuple[np.ndarray, np.ndarray]] = []
    for i, (c, s) in enumerate(zip(cost, size, strict=True)):
        parents = np.tile(np.arange(len(sums)), len(c))
        taken = np.repeat(np.arange(len(c)), len(sums))
        sums, totals = sums[parents] + c[taken], totals[parents] + s[taken]
        bound = sums + price * (totals - budget) + least[i + 1]
        alive = np.flatnonzero((bound <= upper_bound) & (totals <= room[i + 1]))
        alive = alive[np.lexsort((sums[alive], totals[alive]))]
        before = np.minimum.accumulate(np.concatenate([[np.inf], sums[alive][:-1]]))
        alive = alive[sums[alive] < before]
        trail.append((parents[alive], taken[alive]))
        sums, totals = sums[alive], totals[alive]
    best = int(sums.argmin())
    chosen = []
    for (parents, taken), ordered in zip(reversed(trail), reversed(options), strict=True):
        chosen.append(ordered[taken[best]])
        best = int(parents[best])
    return chosen[::-1]


def check_budget(sizes: Sequence[Mapping[int, int]], budget: int) -> None:
    """Check that the smallest options fit in the budget.

    Args:
        sizes: The size of each option, by option, of each group.
        budget: Maximum total size.

    Raises:
        UsageError: They do not fit; the message gives the smallest total size.
    """
    smallest = sum(min(group.values()) for group in sizes)
    if smallest > budget:
        raise UsageError(
            f"the smallest possible size is {smallest} bytes; got {budget}. "
            "Give that size or a larger one."
        )


def _relaxed(
    cost: Sequence[np.ndarray], size: Sequence[np.ndarray], budget: int
) -> tuple[float, float]:
    """The price λ per byte at which the cheapest options fit in the budget, and their cost."""

    def choice(price: float) -> tuple[int, float]:
        # Of equally good options, the smallest one.
        picks = [np.lexsort((s, c + price * s))[0] for c, s in zip(cost, size, strict=True)]
        total = sum(int(s[pick]) for s, pick in zip(size, picks, strict=True))
        return total, sum(float(c[pick]) for c, pick in zip(cost, picks, strict=True))

    low, high = 0.0, 1.0
    while choice(high)[0] > budget:
        high *= 2
    for _ in range(_BISECTION_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if choice(middle)[0] > budget else (low, middle)
    return high, choice(high)[1]
