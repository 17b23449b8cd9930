"""Channels that are split and merged so that none stands out (QLLM, arXiv 2310.08041, section 4.1).

For a layer y = Σ_c x_c w_c with columns w_c:

    disassembly   x_c w_c = T (x_c / T) w_c              exact
    assembly      x_i w_i + x_j w_j ≈ ½(x_i + x_j)(w_i + w_j)

The assembly misses ½(x_i − x_j)(w_i − w_j).
"""

from dataclasses import dataclass

import torch
from torch import Tensor


def reassembled(x: Tensor, first: Tensor, second: Tensor, shares: Tensor) -> Tensor:
    """Return the channels x_first s_0 + x_second s_1.

    Args:
        x: [..., C].
        first: Integers [C].
        second: Integers [C].
        shares: s, [2, C].
    """
    return x.index_select(-1, first) * shares[0] + x.index_select(-1, second) * shares[1]


@dataclass(frozen=True, eq=False)
class Channels:
    """New channels of a layer's input, as many as before.

    Attributes:
        first: See `reassembled`, as for the others.
        second: The other channel of a merged pair.
        shares: Of both.
        columns: The columns of the weight [O, C] that read the new channels.
    """

    first: Tensor
    second: Tensor
    shares: Tensor
    columns: Tensor


def merged_pairs(x: Tensor, weight: Tensor, free: Tensor, count: int) -> list[tuple[int, int]]:
    """Return the most similar pairs of channels, each channel at most once.

    Bipartite soft matching: each second channel is merged with one of the others. Of all such
    pairs those of least ¼‖x_i − x_j‖² ‖w_i − w_j‖² are taken.

    Args:
        x: Inputs [M, C].
        weight: [O, C].
        free: Whether a channel may be merged, [C].
        count: Number of pairs, at most.
    """
    index = free.nonzero().flatten()
    ours, others = index[::2], index[1::2]
    if not len(others):
        return []
    apart = torch.cdist(x.mT[ours], x.mT[others]) * torch.cdist(weight.mT[ours], weight.mT[others])
    found: list[tuple[int, int]] = []
    used: set[int] = set()
    for place in apart.flatten().argsort(stable=True).tolist():
        if len(found) == min(count, len(others)):
            break
        pair = int(ours[place // len(others)]), int(others[place % len(others)])
        if used.isdisjoint(pair):
            found.append(pair)
            used.update(pair)
    return found


def new_channels(x: Tensor, weight: Tensor, threshold: float) -> Channels:
    """Return channels of which none exceeds a threshold, where enough others can be merged.

    A channel whose largest magnitude is m becomes ⌈m/θ⌉ copies, each with that part of its values.
    The places of the copies are those of merged channels. Channels with the largest values are
    split first.

    Args:
        x: Inputs [M, C].
        weight: W, [O, C].
        threshold: θ > 0.
    """
    peaks = x.abs().amax(0)
    copies = (peaks / threshold).ceil().clamp(min=1).long()
    pairs = merged_pairs(x, weight, copies == 1, int((copies - 1).sum()))
    index = torch.arange(len(peaks), device=x.device)
    first, second, columns = index.clone(), index.clone(), weight.clone()
    shares = torch.stack([torch.ones_like(peaks), torch.zeros_like(peaks)])
    left = list(pairs)
    for channel in peaks.argsort(descending=True).tolist():
        wanted = int(copies[channel])
        if wanted == 1 or len(left) < wanted - 1:
            continue
        places = [left.pop(0) for _ in range(wanted - 1)]
        for kept, freed in places:
            second[kept] = freed
            shares[:, kept] = 0.5
            columns[:, kept] = weight[:, kept] + weight[:, freed]
            first[freed] = second[freed] = channel
            columns[:, freed] = weight[:, channel]
        shares[0, [channel, *(freed for _, freed in places)]] = 1 / wanted
    return Channels(first, second, shares, columns)
