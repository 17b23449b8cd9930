"""Mean and variance of channels."""

import pytest
import torch

from gdfq.functional.moments import moments


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 4), (5, 7, 3, 4), (5, 7, 2, 3, 4)])
def test_moments_match_torch_for_every_rank(shape: tuple[int, ...]) -> None:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 3 + 100
    mean, variance = moments(x)
    columns = x.double().transpose(0, 1).reshape(7, -1)
    assert torch.allclose(mean.double(), columns.mean(1))
    assert torch.allclose(variance.double(), columns.var(1, correction=0), rtol=1e-4)
