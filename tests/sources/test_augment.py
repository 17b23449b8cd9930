"""Shifts and mirrored images."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gdfq.sources.augment import shifted_and_flipped


@settings(max_examples=30)
@given(seed=st.integers(0, 2**31), size=st.sampled_from([[16, 24], [40], [7, 7], [8, 8, 8]]))
def test_augmentation_shifts_and_mirrors_only(seed: int, size: list[int]) -> None:
    images = torch.rand(3, 2, *size, generator=torch.Generator().manual_seed(seed))
    moved = shifted_and_flipped(images, torch.Generator().manual_seed(seed))
    assert moved.shape == images.shape
    # Every value comes from the same image and channel, and the middle survives.
    for before, after in zip(images.flatten(0, 1), moved.flatten(0, 1), strict=True):
        assert bool(torch.isin(after, before).all())
        middle = before[tuple(slice(side // 4, side - side // 4) for side in size)]
        assert bool(torch.isin(middle, after).all())
