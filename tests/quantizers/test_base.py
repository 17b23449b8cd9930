"""QDrop."""

import pytest
import torch

from gdfq.quantizers.base import QDrop


def test_qdrop_passes_the_given_share() -> None:
    through, otherwise = torch.ones(100, 100), torch.zeros(100, 100)
    mixed = QDrop(0.3, torch.Generator().manual_seed(0))(through, otherwise)
    assert float(mixed.mean()) == pytest.approx(0.3, abs=0.02)
