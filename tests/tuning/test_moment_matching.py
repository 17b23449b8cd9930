"""Moments of the student are matched to those of the teacher."""

from typing import Any

import pytest
import torch
from support.students import noise, student_of
from torch import Tensor, fx, nn
from torch.nn import functional as F

from gdfq.execution.budget import MemoryBudget
from gdfq.functional.grid import Bits
from gdfq.graph.batch_norms import fold_batch_norms
from gdfq.graph.capture import Captured, capture
from gdfq.quantizers.family import LSQ
from gdfq.sources.base import Batch
from gdfq.student.build import build_student
from gdfq.student.freeze import freeze
from gdfq.student.scheme import Scheme
from gdfq.tuning import moment_matching
from gdfq.tuning.calibrate import calibrate_
from gdfq.tuning.moment_matching import match_moments_, match_output_mean_, matched_images


@pytest.fixture
def images() -> Tensor:
    return noise()


def test_matched_moments_are_those_of_the_teacher(teacher: Captured, images: Tensor) -> None:
    student = student_of(teacher, images)
    before = layer_moments(student.network, images)
    match_moments_(student, teacher, (images,))
    after = layer_moments(student.network, images)
    expected = layer_moments(fold_batch_norms(teacher).network, images)
    assert len(expected) == 3
    for name, goal in expected.items():
        torch.testing.assert_close(after[name], goal, rtol=1e-3, atol=1e-4)
        error, old = (float((m[name] - goal).abs().max()) for m in (after, before))
        assert old > 10 * error  # there was something to do
    # What was corrected is what is frozen.
    assert distance(freeze(student)(images), student(images)) < 0.03


def distance(actual: Tensor, expected: Tensor) -> float:
    """Relative distance of logits: freezing rounds biases, which moves some activations by one code."""
    return float((actual - expected).detach().norm() / expected.detach().norm())


def layer_moments(network: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Mean and deviation of each layer's output channels, by the layer's name."""
    found = {}

    class Look(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n.op == "call_function" and ("conv" in str(n.target) or "linear" in str(n.target)):
                others = [d for d in range(value.ndim) if d != 1]
                found[n.name] = torch.stack([value.mean(others), value.std(others, correction=0)])
            return value

    with torch.no_grad():
        Look(network).run(images)
    return found


def test_constant_channels_keep_their_scale(teacher: Captured, images: Tensor) -> None:
    """One image has no deviation at the logits: only the mean can be matched there."""
    one = images[:1]
    student = student_of(teacher, one, "w8a8")
    steps = student.network.get_buffer("fake_weight.linear.scale").clone()
    match_moments_(student, teacher, (one,))
    assert torch.equal(student.network.get_buffer("fake_weight.linear.scale"), steps)
    torch.testing.assert_close(student(one), teacher.network(one), rtol=1e-3, atol=1e-3)


def test_matched_moments_match_hand_computed_values() -> None:
    """One linear layer: the channel's scale and shift follow from the two moments."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3, bias=False))
    teacher = capture(model.eval(), torch.zeros(2, 1, 2, 2))
    x = torch.randn(50, 1, 2, 2)
    student = build_student(teacher, Scheme(Bits(2, 8), "full"), quantizers=LSQ)
    calibrate_(student, [Batch((x,), None, None)], steps=1)
    q, wanted = student(x).detach(), teacher.network(x)
    match_moments_(student, teacher, (x,))
    factor = wanted.std(0) / q.std(0)
    assert bool((factor > 0.5).all() and (factor < 2).all())
    expected = (q - q.mean(0)) * factor + wanted.mean(0)
    torch.testing.assert_close(student(x).detach(), expected, rtol=1e-4, atol=1e-5)


class GatedDenoiser(nn.Module):
    """What follows the last layer is known: a factor that depends on the time step alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 5, 3, padding=1)
        self.last = nn.Conv2d(5, 2, 3, padding=1, bias=False)
        self.gate = nn.Linear(1, 2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        predicted = self.last(F.silu(self.first(x)))
        return predicted * self.gate(t[:, None]).exp()[:, :, None, None]


@pytest.mark.parametrize("memory", [MemoryBudget(), MemoryBudget(1)], ids=["whole", "one by one"])
def test_output_mean_is_the_bias_of_least_square_error(memory: MemoryBudget) -> None:
    """The bias of the layer that predicts moves by its mean error, and nothing else does."""
    torch.manual_seed(0)
    x, t = torch.randn(20, 3, 4, 4), torch.rand(20)
    teacher = capture(GatedDenoiser().eval(), (x[:2], t[:2]))
    student = build_student(teacher, Scheme(Bits(3, 8), "full", denoiser=True), quantizers=LSQ)
    calibrate_(student, [Batch((x, t), None, None)], steps=1)
    gate = teacher.network.get_parameter
    factor = (t[:, None] @ gate("gate.weight").T + gate("gate.bias")).exp()[:, :, None, None]

    def error() -> Tensor:
        """Of the last layer, [20, 2, 4, 4]."""
        return ((student(x, t) - teacher.network(x, t)) / factor).detach()

    old, before = error(), {name: value.clone() for name, value in student.state_dict().items()}
    match_output_mean_(student, fold_batch_norms(teacher), (x, t), memory)
    mean = old.mean((0, 2, 3))
    torch.testing.assert_close(error(), old - mean.view(1, 2, 1, 1), rtol=1e-3, atol=1e-5)
    (name,) = (n for n, value in student.state_dict().items() if not value.equal(before[n]))
    torch.testing.assert_close(student.state_dict()[name], -mean)


def test_channel_whose_variance_few_values_make_up_is_left_as_it_is() -> None:
    """One image of 200 that the student clips says nothing about the others' scale."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3, bias=False))
    teacher = capture(model.eval(), torch.zeros(2, 1, 2, 2))
    x = torch.randn(200, 1, 2, 2)
    student = build_student(teacher, Scheme(Bits(8, 8), "full"), quantizers=LSQ)
    calibrate_(student, [Batch((x,), None, None)], steps=1)
    x[0] = 30  # beyond the calibrated range
    match_moments_(student, teacher, (x,))
    scale = student.network.get_parameter("fake_weight.linear.log_scale").detach()
    torch.testing.assert_close(scale, torch.zeros_like(scale))
    expected, actual = teacher.network(x[1:]), student(x[1:]).detach()
    assert float((actual - expected).norm() / expected.norm()) < 0.1  # the range is wider


def test_images_join_where_feature_maps_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second layer still reads a map of 8·16·16; from the third on they have 8·8·8."""
    torch.manual_seed(0)
    convolutions = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, 2, 1), nn.Conv2d(8, 4, 1)
    net = nn.Sequential(*(part for layer in convolutions for part in (layer, nn.ReLU()))).eval()
    images = torch.randn(12, 3, 16, 16)
    teacher = capture(net, images[:1])
    monkeypatch.setattr(moment_matching, "_MAX_ELEMENTS", 4 * 8 * 16 * 16)
    monkeypatch.setattr(moment_matching, "_MIN_IMAGES", 1)
    assert list(matched_images(teacher.network.graph, 100).values()) == [4, 4, 16]
    assert list(matched_images(teacher.network.graph, 12).values()) == [4, 4, 12]
    student = student_of(teacher, images)
    match_moments_(student, teacher, (images,))
    expected = layer_moments(teacher.network, images)
    few = layer_moments(teacher.network, images[:4])
    for (name, goal), of_few in zip(expected.items(), few.values(), strict=True):
        used = images if name == list(expected)[-1] else images[:4]
        found = layer_moments(student.network, used)[name]
        torch.testing.assert_close(found, goal if len(used) == 12 else of_few, rtol=1e-3, atol=1e-4)
