"""Distillation: losses by hand, updates, and batches in parts."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import networks
from support.narrowing import instance, present
from support.students import noise, student_of
from torch import Tensor, nn

import gdfq
from gdfq import RECIPES
from gdfq.execution.context import Context
from gdfq.execution.progress import Step
from gdfq.functional.grid import Bits, affine_grid
from gdfq.graph.capture import Captured
from gdfq.optim import SgdConfig
from gdfq.recipes import FAST, PAPER, Recipe
from gdfq.sources.base import Batch
from gdfq.sources.generator import GeneratorSource
from gdfq.student.build import build_student
from gdfq.student.scheme import Scheme
from gdfq.tuning.calibrate import calibrate_
from gdfq.tuning.distill import Distillation, tune_


def test_student_loss_matches_a_hand_computed_value() -> None:
    from gdfq.optim import SgdConfig

    student, teacher = torch.tensor([[0.0, 1.0]]), torch.tensor([[2.0, 0.0]])
    config = Distillation(SgdConfig(lr=0.1), temperature=1.0, distillation=3.0)
    p, q = (logits.double().softmax(1)[0] for logits in (teacher, student))
    kl = float((p * (p / q).log()).sum()) / 2
    expected = float(-q[0].log()) + 3 * kl
    assert float(
        config.losses((student, ()), (teacher, ()), torch.tensor([0]))["student"]
    ) == pytest.approx(expected, rel=1e-5)


def test_hard_labels_count_for_easy_images_only() -> None:
    teacher = torch.tensor([[2.0, 0.0], [0.0, 2.0]])  # p_y = 0.88 and 0.12
    student = torch.tensor([[0.0, 1.0], [3.0, 1.0]])
    labels = torch.tensor([0, 0])
    config = replace(instance(RECIPES["synq"].tuning, Distillation), difficulty=0.5)
    actual = config.losses((student, ()), (teacher, ()), labels)["ce"]
    assert float(actual) == pytest.approx(-float(student[0].log_softmax(0)[0]) / 2)


@pytest.fixture
def images() -> Tensor:
    return noise()


@pytest.mark.parametrize("at_once", [10, 33])  # parts of equal and of different length
def test_parts_of_a_batch_give_the_same_gradient(
    teacher: Captured, images: Tensor, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    batch = Batch((images,), torch.zeros(len(images), dtype=torch.long), None)
    # Features are relative to each part's own; the rest is exactly a mean over images.
    config = replace(instance(FAST.tuning, Distillation), features=0.0, optimizer=SgdConfig(lr=0.0))
    gradients: list[list[Tensor]] = []
    losses: list[Step] = []
    for number in (1000, at_once):
        monkeypatch.setattr("gdfq.tuning.distill._MAX_FEATURE_BYTES", 4 * 8 * 64 * number)
        student = student_of(teacher, images)
        tune_(student, teacher, [batch], config, first_step=0, total_steps=1, context=Context(listener=losses.append))  # fmt: skip
        gradients.append([p.grad.clone() for p in student.parameters() if p.grad is not None])
    assert float(losses[0].losses["student"]) == pytest.approx(float(losses[1].losses["student"]), rel=1e-5)  # fmt: skip
    for whole, parts in zip(*gradients, strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-5)


class RoundSTE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, low: Tensor, high: Tensor, levels: int) -> Tensor:
        scale, zero = affine_grid(low, high, levels)
        q = ((x / scale).round() + zero).clamp(-(2 ** (levels - 1)), 2 ** (levels - 1) - 1)
        return (q - zero) * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return grad, None, None, None


def by_hand(
    model: nn.Module, parameters: dict[str, Tensor], ranges: list[Tensor], x: Tensor
) -> Tensor:
    """The Residual network with 4-bit weights and ReLU outputs, its statistics fixed."""

    def weight(name: str) -> Tensor:
        w = parameters[name]
        low, high = (
            f(w.detach().flatten(1), 1).view(-1, *[1] * (w.ndim - 1))
            for f in (torch.amin, torch.amax)
        )
        return RoundSTE.apply(w, low, high, 4)

    def norm(y: Tensor, name: str) -> Tensor:
        module = getattr(model, name)
        return F.batch_norm(
            y,
            module.running_mean,
            module.running_var,
            parameters[f"{name}.weight"],
            parameters[f"{name}.bias"],
        )

    def relu(y: Tensor, i: int) -> Tensor:
        return RoundSTE.apply(F.relu(y), torch.tensor(0.0), ranges[i], 4)

    x = relu(norm(F.conv2d(x, weight("conv1.weight"), padding=1), "bn1"), 0)
    y = F.conv2d(x, weight("conv2.weight"), parameters["conv2.bias"], padding=1)
    y = relu(norm(y, "bn2") + x, 1)
    return F.linear(y.mean((2, 3)), weight("fc.weight"), parameters["fc.bias"])


def test_two_updates_match_the_textbook(teacher: Captured) -> None:
    """Weights are rounded in each forward pass, rates decay, and the momentum is Nesterov's."""
    model = networks.make("Residual")
    batches = list(GeneratorSource(batch=8).stream(teacher, steps=3))
    config = replace(instance(PAPER.tuning, Distillation), optimizer=SgdConfig(lr=0.05))
    student = build_student(teacher, Scheme(Bits(4, 4), "relu"))
    calibrate_(student, batches[:1], steps=1)
    ranges = [instance(q.scale, Tensor) * 15 for q in student.activations]
    parameters = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    velocity = {n: torch.zeros_like(p) for n, p in parameters.items()}
    tune_(student, teacher, iter(batches[1:]), config, first_step=1, total_steps=3)

    for step, batch in ((1, batches[1]), (2, batches[2])):
        rate = 0.05 * 0.1 ** sum(step >= round(m * 3) for m in (0.25, 0.5, 0.75))
        logits = by_hand(model, parameters, ranges, batch.images)
        p, log_q = (present(batch.teacher_logits) / 20).softmax(1), (logits / 20).log_softmax(1)
        kd = 400 * (p * (p.log() - log_q)).mean()
        loss = F.cross_entropy(logits, present(batch.labels)) + kd
        grads = torch.autograd.grad(loss, list(parameters.values()))
        for (name, parameter), grad in zip(parameters.items(), grads, strict=True):
            grad = grad + 1e-4 * parameter.detach()
            velocity[name] = grad if step == 1 else 0.9 * velocity[name] + grad
            with torch.no_grad():
                parameter -= rate * (grad + 0.9 * velocity[name])
    tuned = dict(student.network.named_parameters())
    for name in ("conv1.weight", "conv2.weight", "fc.weight", "fc.bias"):
        assert torch.allclose(tuned[name], parameters[name], atol=1e-5), name
        assert not torch.equal(tuned[name], dict(model.named_parameters())[name])
    assert torch.allclose(
        tuned["student_batch_norm.batch_norm.weight"], parameters["bn1.weight"], atol=1e-5
    )


def test_warm_up_leaves_the_student_unchanged(teacher: Captured, tiny: Recipe) -> None:

    heard: list[Step] = []
    recipe = replace(tiny, calibration=2, warmup=6)
    gdfq.quantize(teacher, networks.images(1), "w4a4", recipe, listener=heard.append)
    stages = [(step.stage, step.index) for step in heard]
    assert stages == [
        *(("calibrate", i) for i in (1, 2)),
        *(("warmup", i) for i in (3, 4, 5, 6)),
        *(("tune", i) for i in (7, 8)),
    ]
