"""The Fréchet distance."""

import pytest
import torch

from gdfq.errors import UsageError
from gdfq.functional.frechet import frechet_distance


def test_distance_of_one_dimension_is_that_by_hand() -> None:
    a, b = torch.tensor([[0.0], [2.0]]), torch.tensor([[3.0], [3.0], [9.0]])
    # Means 1 and 5, variances 2 and 12: 16 + (√12 − √2)².
    expected = 16 + (12**0.5 - 2**0.5) ** 2
    assert float(frechet_distance(a, b)) == pytest.approx(expected)


def test_distance_of_commuting_covariances_is_the_sum_over_axes() -> None:
    draw = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=draw, dtype=torch.float64)).Q
    base = torch.randn(50, 3, generator=draw, dtype=torch.float64)
    base = (base - base.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(base.T.cov())).T
    a, b = (base * torch.tensor(s) @ turn for s in ([1.0, 2.0, 3.0], [2.0, 2.0, 5.0]))
    assert float(frechet_distance(a, b)) == pytest.approx(1 + 0 + 4, rel=1e-6)
    assert float(frechet_distance(b, a)) == pytest.approx(5, rel=1e-6)
    assert float(frechet_distance(a, a)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("shape", [(1, 3), (4, 2), (4, 3, 1)])
def test_sets_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="two sets of at least two vectors"):
        frechet_distance(torch.zeros(4, 3), torch.zeros(shape))
