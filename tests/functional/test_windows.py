"""Arguments of convolutions by axis, and what they pad with, on values computed by hand."""

import torch

from gdfq.functional.windows import padding_ends, per_axis, zero_padded


def test_one_number_stands_for_all_axes() -> None:
    assert per_axis(2, 3) == per_axis([2], 3) == [2, 2, 2]
    assert per_axis((1, 2), 2) == [1, 2]


def test_paddings_by_axis() -> None:
    assert padding_ends(1, (3, 5), (1, 1)) == [(1, 1), (1, 1)]
    assert padding_ends((0, 2), (3, 5), (1, 1)) == [(0, 0), (2, 2)]
    assert padding_ends("valid", (3, 5), (1, 1)) == [(0, 0), (0, 0)]
    # Kernels of 2 and 3 taps that lie 1 and 2 apart reach over 1 and 4 entries more than one.
    assert padding_ends("same", (2, 3), (1, 2)) == [(0, 1), (2, 2)]


def test_padding_adds_zeros_at_the_ends_of_the_last_axes() -> None:
    x = torch.ones(1, 2, 1)
    found = zero_padded(x, [(1, 0), (0, 2)])
    assert found.tolist() == [[[0, 0, 0], [1, 0, 0], [1, 0, 0]]]
    assert zero_padded(x, [(0, 0), (0, 0)]) is x
