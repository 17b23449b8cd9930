"""The privacy measure finds copies of training images and no others."""

import pytest
import torch
from benchmarks import privacy


def test_nearest_matches_hand_computed_distances() -> None:
    asked = torch.tensor([[0.0, 0.0], [3.0, 4.0], [9.0, 0.0]])
    references = torch.tensor([[0.0, 1.0], [3.0, 0.0], [9.0, 2.0], [3.0, 3.0]])
    distance, which = privacy.nearest(asked, references)  # two images, mirrored behind
    assert distance.tolist() == [1, 1, 2]
    assert which.tolist() == [0, 1, 0]


def test_copies_are_nearer_and_independent_images_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(privacy, "REFERENCES", 300)
    draw = torch.Generator().manual_seed(0)
    train, test, strangers = (torch.randn(600, 12, generator=draw) for _ in range(3))
    copied = train[:200] + 0.1 * torch.randn(200, 12, generator=draw)
    found = privacy.compared(copied, train, test)
    assert found["nearer_to_training"] == [1, 1, 1]
    assert found["ratio_of_medians"][2] < 0.5
    share, low, high = privacy.compared(strangers, train, test)["nearer_to_training"]
    assert low < 0.5 < high
    assert low < share < high
    mixed = torch.cat([copied, strangers])  # a quarter of them are copies
    assert privacy.compared(mixed, train, test)["nearer_to_training"][1] > 0.5


def test_resampling_draws_queries_of_one_nearest_image_together() -> None:
    owner = torch.tensor([7, 7, 7, 2])
    for chosen in list(privacy.resampled(owner))[:50]:
        counts = torch.bincount(chosen, minlength=4).tolist()
        assert counts[0] == counts[1] == counts[2]
        assert counts[0] + counts[3] == 2


def test_without_contrast_ignores_contrast_and_brightness() -> None:
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 100, (4, 3, 8, 8), generator=draw, dtype=torch.uint8)
    torch.testing.assert_close(
        privacy.without_contrast(pixels), privacy.without_contrast(2 * pixels + 30)
    )
