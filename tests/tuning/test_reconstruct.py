"""Block-wise reconstruction."""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from support.denoisers import SHAPE, tiny_denoiser
from support.plain_scheduler import PlainConfig
from support.students import noise, student_of
from torch import Tensor, nn

from gdfq.diffusion.weights import MinSnr
from gdfq.execution.context import Context
from gdfq.execution.progress import Step
from gdfq.functional.grid import Bits
from gdfq.graph.capture import Captured, capture
from gdfq.quantizers.adaround import RoundedWeight
from gdfq.quantizers.base import QDrop
from gdfq.quantizers.family import ADAROUND, LSQ, QuantizerFamily
from gdfq.sources.base import Batch
from gdfq.student.build import build_student
from gdfq.student.freeze import freeze
from gdfq.student.scheme import Scheme
from gdfq.tuning.calibrate import calibrate_
from gdfq.tuning.grid_adam import GridAdam
from gdfq.tuning.reconstruct import Reconstruction, reconstruct_


@pytest.fixture
def images() -> Tensor:
    return noise()


def distance(actual: Tensor, expected: Tensor) -> float:
    """Relative distance of logits: freezing rounds biases, which moves some activations by one code."""
    return float((actual - expected).detach().norm() / expected.detach().norm())


@pytest.mark.parametrize("quantizers", [LSQ, ADAROUND], ids=lambda family: family.name)
def test_reconstruction_reduces_the_error_of_each_block(
    teacher: Captured, images: Tensor, quantizers: QuantizerFamily
) -> None:
    student = student_of(teacher, images, "w2a4", quantizers)
    expected = teacher.network(images)
    before = F.mse_loss(freeze(student)(images), expected)
    config = Reconstruction(GridAdam(0.02, 1e-3, 1e-3, 0.05), images=64, batch=16, rounding=1e-3)
    seen: list[Step] = []
    batches = Batch((images,), torch.zeros(64, dtype=torch.long), None).split(16)
    reconstruct_(
        student, teacher, batches, config, updates=60, context=Context(listener=seen.append)
    )
    frozen = freeze(student)
    assert float(F.mse_loss(frozen(images), expected)) < 0.7 * float(before)
    assert distance(frozen(images), student(images)) < 0.03
    assert all(module.dropping is None for module in student.activations)
    assert [step.index for step in seen] == list(range(1, len(seen) + 1))


class Twice(nn.Module):
    """One convolution in two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.shared = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.shared(self.stem(x)))
        x = F.relu(self.shared(x))
        return self.head(x.mean((2, 3)))


def test_parameter_shared_by_blocks_is_trained_in_the_first(images: Tensor) -> None:
    torch.manual_seed(0)
    teacher = capture(Twice().eval(), images[:2])
    student = student_of(teacher, images, quantizers=ADAROUND)
    config = Reconstruction(GridAdam(0.0, 0.01, 0.0, 0.05), images=64, batch=8)
    steps = []

    def listener(step: Step) -> None:
        steps.append(
            student.network.get_parameter("fake_weight.conv2d_1.log_scale").detach().clone()
        )

    batches = [Batch((images,), None, None)]
    reconstruct_(student, teacher, batches, config, updates=10, context=Context(listener=listener))
    assert len(steps) == 40  # stem, shared, shared again, head
    assert not torch.equal(steps[10], steps[19])
    assert torch.equal(steps[19], steps[-1])


def test_regulariser_decides_roundings_and_activations_drop(
    teacher: Captured, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    undecided = {}
    mixed: list[torch.Size] = []
    settle = QDrop.__call__

    def recorded(dropping: QDrop, *tensors: Tensor) -> Tensor:
        mixed.append(tensors[0].shape)
        return settle(dropping, *tensors)

    monkeypatch.setattr(QDrop, "__call__", recorded)
    for weight in (0.0, 1.0):
        student = student_of(teacher, images, "w3a4", ADAROUND)
        config = Reconstruction(GridAdam(0.0, 0.0, 0.0, 0.2), images=64, batch=8, rounding=weight)
        batches = [Batch((images,), None, None)]
        mixed.clear()
        reconstruct_(
            student, teacher, batches, config, updates=100, context=Context(listener=lambda _: None)
        )
        rounded = [m for m in student.modules() if isinstance(m, RoundedWeight)]
        assert all(m.settled for m in rounded)
        for module in rounded:
            module.settled = False
        soft = torch.cat([m.rounding().flatten() for m in rounded])
        undecided[weight] = float(((soft > 0.1) & (soft < 0.9)).float().mean())
    assert undecided[1.0] < 0.5 * undecided[0.0]
    # Each update mixes the block's input and each activation in it: 2 blocks with one, the head.
    assert len(mixed) == 100 * (2 + 2 + 1)


@dataclass(frozen=True)
class WeightedLate(MinSnr):
    """The given weight from time step 5 on, 0 before."""

    late: float = 1.0

    def weights(self, times: Tensor) -> Tensor:
        return torch.where(times >= 5, self.late, 0.0)


def test_errors_of_a_denoiser_have_the_weights_of_their_time_steps() -> None:
    teacher = capture(tiny_denoiser(), (torch.randn(2, *SHAPE), torch.tensor([3, 7])))
    draw = torch.Generator().manual_seed(0)
    batch = Batch((torch.randn(8, *SHAPE, generator=draw), torch.arange(8)), None, None)
    plain = Reconstruction(GridAdam(0.0, 0.0, 0.0, 0.1), images=8, batch=64, drop=0.0)
    assert plain.weighted_by_time(MinSnr(PlainConfig())).time_weights == MinSnr(PlainConfig())

    def first_errors(late: float) -> list[float]:
        """The error of each block before its first update."""
        config = replace(plain, time_weights=WeightedLate(PlainConfig(), late))
        scheme = Scheme(Bits.parse("w2a8"), "full", denoiser=True)
        student, batches = build_student(teacher, scheme, quantizers=ADAROUND), [batch]
        calibrate_(student, batches, steps=1)
        seen: list[Step] = []
        context = Context(listener=seen.append)
        reconstruct_(student, teacher, batches, config, updates=1, context=context)
        return [float(step.losses["error"]) for step in seen]

    once, twice = first_errors(1.0), first_errors(2.0)
    assert len(once) == 3  # `enter`, the sum with its ReLU, `leave`
    assert min(once) > 0
    assert twice == pytest.approx([2 * error for error in once])
    assert first_errors(0.0) == [0, 0, 0]
