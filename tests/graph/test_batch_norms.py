"""Which batch norms fold, and networks where some do not."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from support.narrowing import present
from torch import Tensor, nn

import gdfq
from gdfq.functional.grid import Bits
from gdfq.graph.batch_norms import fold_batch_norms
from gdfq.graph.capture import Captured, capture
from gdfq.quantizers.family import LSQ, MINMAX
from gdfq.recipes import FAST
from gdfq.sources.base import Batch
from gdfq.sources.pool import ImagePool
from gdfq.sources.spectral import SpectralSource
from gdfq.student.build import build_student
from gdfq.student.freeze import freeze
from gdfq.student.scheme import Scheme
from gdfq.tuning.calibrate import calibrate_


class Awkward(nn.Module):
    """A shared convolution behind two batch norms, one before a layer, one transposed layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm2d(3)
        self.shared = nn.Conv2d(3, 3, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(3))
        self.up = nn.ConvTranspose2d(3, 6, 2, stride=2, groups=3, bias=False)
        self.up_norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)
        self.head_norm = nn.BatchNorm1d(4, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(self.first(x))
        x = F.relu(self.norms[0](x)) + x  # the layer's output is used twice: it must not fold
        x = F.relu(self.norms[1](self.shared(x)))
        x = F.relu(self.norms[2](self.shared(x)))
        x = F.relu(self.up_norm(self.up(x)))
        return self.head_norm(self.head(x.mean((2, 3))))


@pytest.fixture(scope="module")
def awkward() -> Captured:
    torch.manual_seed(0)
    network = Awkward()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            present(module.running_mean).normal_()
            present(module.running_var).uniform_(0.5, 2)
            if module.affine:
                module.weight.data.normal_()  # negative scales too
                module.bias.data.normal_()
    return capture(network.eval(), torch.randn(2, 3, 8, 8))


def test_folding_keeps_the_function_and_the_norms_that_cannot_fold(awkward: Captured) -> None:
    folded = fold_batch_norms(awkward)
    x = torch.randn(5, 3, 8, 8)
    assert torch.allclose(folded.network(x), awkward.network(x), atol=1e-4)
    assert len(awkward.batch_norms) == 6
    assert len(folded.batch_norms) == 2  # before a layer, and behind a shared output
    assert len(awkward.batch_norms) == 6  # the teacher itself is left alone


def test_student_with_unfolded_norms_is_close_at_eight_bits(awkward: Captured) -> None:
    x = torch.randn(64, 3, 8, 8)
    student = build_student(awkward, Scheme(Bits(8, 8), "relu"), quantizers=LSQ)
    calibrate_(student, [Batch((x,), torch.zeros(64), None)], steps=1)
    expected = awkward.network(x)
    for network in (student, freeze(student)):
        with torch.no_grad():
            assert float((network(x) - expected).norm() / expected.norm()) < 0.05
    with torch.no_grad():
        assert torch.allclose(student(x), freeze(student)(x), atol=1e-4)


def test_batch_norm_over_tokens_does_not_fold() -> None:
    """BatchNorm1d normalises dimension 1, a linear layer's channels are the last: 6 and 6 here."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)
    )
    network.get_buffer("1.running_mean").normal_()
    network.get_parameter("1.weight").data.uniform_(0.5, 3)
    teacher = capture(network.eval(), torch.randn(2, 6, 4))
    folded = fold_batch_norms(teacher)
    x = torch.randn(5, 6, 4)
    assert len(folded.batch_norms) == 1
    assert torch.allclose(folded.network(x), network(x), atol=1e-5)
    for quantizers in (MINMAX, LSQ):
        student = build_student(teacher, Scheme(Bits(8, 8), "relu"), quantizers=quantizers)
        calibrate_(student, [Batch((x,), torch.zeros(5), None)], steps=1)
        with torch.no_grad():
            assert torch.allclose(student(x), freeze(student)(x), atol=1e-5)


class Keras(nn.Module):
    """Batch norms behind ReLUs, which cannot fold, and one convolution used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.twice = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(F.relu(self.stem(x)))
        x = F.relu(self.twice(F.relu(self.twice(x))))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("placement", ["relu", "full"])
def test_fast_tunes_unfolded_norms_and_shared_layers(placement: str) -> None:
    torch.manual_seed(0)
    network = Keras().eval()
    pool = ImagePool(SpectralSource(batch=8, iterations=3), images=16, batch=8)
    recipe = replace(FAST, source=pool)
    result = gdfq.quantize(
        network, torch.zeros(1, 3, 8, 8), "w8a8", recipe, steps=5, placement=placement
    )
    x = torch.randn(6, 3, 8, 8)
    with torch.no_grad():
        expected = network(x)
        assert float((result(x) - expected).norm() / expected.norm()) < 0.3
    assert torch.is_grad_enabled()
