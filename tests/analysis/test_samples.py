"""Images that a denoiser and its student generate."""

import pytest
import torch
from support.denoisers import SHAPE, tiny_denoiser
from support.plain_scheduler import PlainConfig
from torch import Tensor

from gdfq.analysis.samples import compare_samples, psnr
from gdfq.diffusion.sampler import Sampler
from gdfq.errors import UsageError
from gdfq.execution.context import Context
from gdfq.graph.capture import Captured
from gdfq.plan.denoiser import captured_denoiser

SAMPLER = Sampler(PlainConfig(noise=0.1), SHAPE, 4)


@pytest.fixture(scope="module")
def teacher() -> Captured:
    return captured_denoiser(tiny_denoiser(), SAMPLER)


def test_psnr_is_that_by_hand() -> None:
    reference = torch.linspace(-1, 1, 201).repeat(2, 1)
    reference[0, 0] = 50.0  # no pixel: it does not count for the range
    found = reference + torch.tensor([[0.02], [0.002]])
    # Of 402 values four are left out at each end: from -0.98 to 0.99.
    low, high = reference.flatten().sort().values[[4, -5]].tolist()
    expected = 20 * torch.log10((high - low) / torch.tensor([0.02, 0.002], dtype=torch.float64))
    torch.testing.assert_close(psnr(found, reference), expected, rtol=1e-4, atol=0)
    assert psnr(reference, reference).tolist() == [120, 120]


def test_equal_networks_generate_equal_images(teacher: Captured) -> None:
    found = compare_samples(teacher, teacher.network, SAMPLER, 5, lambda x: x.flatten(1))
    assert (found.images, found.psnr, found.errors) == (5, 120, (0, 0, 0, 0))
    assert found.frechet == pytest.approx(0, abs=1e-6)
    assert (found.teacher == found.student).all()
    assert found.teacher.shape == (5, *SHAPE)
    assert found.timesteps == (100, 75, 50, 25)


def test_errors_are_those_of_each_call(teacher: Captured) -> None:
    def student(x: Tensor, t: Tensor) -> Tensor:
        factor = 1 + 0.1 * (t == 50)
        return factor[:, None, None, None] * teacher.network(x, t)

    found = compare_samples(teacher, student, SAMPLER, 3)
    torch.testing.assert_close(torch.tensor(found.errors), torch.tensor([0, 0, 10.0, 0]))
    assert found.frechet is None
    assert 0 < found.psnr_low <= found.psnr < 120


def test_images_depend_on_the_seed_and_not_on_their_number(teacher: Captured) -> None:
    one, more, other = (
        compare_samples(teacher, teacher.network, SAMPLER, count, context=Context(seed=seed))
        for count, seed in ((2, 1), (70, 1), (2, 2))
    )
    difference = one.teacher[0].astype(int) - more.teacher[0]
    assert abs(difference).max() < 60  # their range is that of all shown
    assert (one.teacher != other.teacher).any()


def test_no_samples_are_refused(teacher: Captured) -> None:
    with pytest.raises(UsageError, match="samples must be a whole number"):
        compare_samples(teacher, teacher.network, SAMPLER, 0)
