"""Orders of dimensions: a tensor of a file has its channels last, one of PyTorch second.

A tensor's `order` names, for each of its dimensions in the file, the dimension of the network:
(0, 2, 3, 1) for a map [N, C, H, W] that the file holds as [N, H, W, C].
"""

from collections.abc import Sequence
from dataclasses import dataclass

BATCH = 1_000_003
"""Length of the batch while shapes are computed: lengths that it divides grow with the batch."""
CHANNELS_LAST = {4: (0, 2, 3, 1)}
"""The order of maps, by the number of their dimensions."""

Order = tuple[int, ...]


def grows_with_batch(length: int) -> bool:
    """Return whether a length is a multiple of the batch's."""
    return length != 0 and length % BATCH == 0


def depends_on_batch(length: int) -> bool:
    """Return whether a length depends on the batch in another way, as one less than it does."""
    return length > BATCH // 4 and not grows_with_batch(length)


def in_file(shape: Sequence[int]) -> tuple[int, ...]:
    """Return a shape in which −1 stands for lengths that grow with the batch."""
    return tuple(-1 if grows_with_batch(length) else length for length in shape)


def identity(rank: int) -> Order:
    return tuple(range(rank))


def usual(rank: int) -> Order:
    """Return the order of the inputs and outputs of a file."""
    return CHANNELS_LAST.get(rank, identity(rank))


def permuted(shape: Sequence[int], order: Order) -> tuple[int, ...]:
    """Return a shape of the network in the order of the file."""
    return tuple(shape[dim] for dim in order)


def without_ones(order: Order, shape: Sequence[int]) -> Order:
    """Return the order of those dimensions that have more than one entry."""
    return tuple(dim for dim in order if shape[dim] != 1)


@dataclass(frozen=True)
class Regrouping:
    """How a file reshapes a tensor: first to this order, then the result has that one."""

    before: Order
    after: Order


def regrouping(shape: Sequence[int], target: Sequence[int], order: Order) -> Regrouping:
    """Return the orders before and after a reshape of a tensor.

    Dimensions that a reshape splits or joins form groups, such as C -> (2, C/2), and the others
    stay. A file can reshape in its own order if each group's dimensions follow each other there.

    Args:
        shape: Shape in the network.
        target: Shape after it.
        order: Order of the tensor.
    """
    groups = _groups(shape, target)
    by_dim = {dim: group for group in groups for dim in group[0]}
    seen = [by_dim[dim] for dim in without_ones(order, shape)]
    in_turn = list(dict.fromkeys(seen))
    before = [dim for sources, _ in in_turn for dim in sources]
    after = [dim for _, targets in in_turn for dim in targets]
    return Regrouping(with_ones(before, len(shape), order), with_ones(after, len(target)))


Group = tuple[tuple[int, ...], tuple[int, ...]]


def _groups(shape: Sequence[int], target: Sequence[int]) -> list[Group]:
    """Return the smallest groups of dimensions with equal products, those of length 1 left out."""
    sources, targets = (
        [(dim, length) for dim, length in enumerate(lengths) if length != 1]
        for lengths in (shape, target)
    )
    groups: list[Group] = []
    while sources:
        taken: tuple[list[int], list[int]] = ([], [])
        sizes = [1, 1]
        while not taken[0] or sizes[0] != sizes[1]:
            side = int(bool(taken[0]) and sizes[1] < sizes[0])
            dim, length = (sources, targets)[side].pop(0)
            taken[side].append(dim)
            sizes[side] *= length
        groups.append((tuple(taken[0]), tuple(taken[1])))
    return groups


def with_ones(order: Sequence[int], rank: int, preferred: Order | None = None) -> Order:
    """Return an order of all dimensions, given that of those with more than one entry.

    The others may stand anywhere: if possible, the result is the preferred or the usual order.
    """
    for known in (preferred, usual(rank), identity(rank)):
        if known is not None and [dim for dim in known if dim in order] == list(order):
            return known
    result = list(order)
    for dim in range(rank):
        if dim not in result:
            result.insert(result.index(dim - 1) + 1 if dim else 0, dim)
    return tuple(result)
