"""Block-wise reconstruction."""

import pytest
import torch
import torch.nn.functional as F
from support.students import noise, student_of
from torch import Tensor, nn

from gdfq.execution.context import Context
from gdfq.execution.progress import Step
from gdfq.graph.capture import Captured, capture
from gdfq.quantizers.adaround import RoundedWeight
from gdfq.quantizers.base import QDrop
from gdfq.quantizers.family import ADAROUND, LSQ, QuantizerFamily
from gdfq.sources.base import Batch
from gdfq.student.freeze import freeze
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
