"""`tune_` against a loop written out by hand."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from support import networks

from gdfq.functional.grid import Bits, affine_grid
from gdfq.optim import Cosine, SgdConfig, set_rate_
from gdfq.quantizers.family import LSQ
from gdfq.recipes import FAST, PAPER
from gdfq.sources.generator import GeneratorSource
from gdfq.student.build import build_student
from gdfq.student.scheme import Scheme
from gdfq.tuning.calibrate import calibrate_
from gdfq.tuning.distill import tune_
from gdfq.tuning.grid_adam import GridAdam


class RoundSTE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, low, high, levels):
        scale, zero = affine_grid(low, high, levels)
        q = ((x / scale).round() + zero).clamp(-(2 ** (levels - 1)), 2 ** (levels - 1) - 1)
        return (q - zero) * scale

    @staticmethod
    def backward(ctx, grad):
        return grad, None, None, None


def by_hand(model, parameters, ranges, x):
    """The Residual network with 4-bit weights and ReLU outputs, its statistics fixed."""

    def weight(name):
        w = parameters[name]
        low, high = (
            f(w.detach().flatten(1), 1).view(-1, *[1] * (w.ndim - 1))
            for f in (torch.amin, torch.amax)
        )
        return RoundSTE.apply(w, low, high, 4)

    def norm(y, name):
        module = getattr(model, name)
        return F.batch_norm(
            y,
            module.running_mean,
            module.running_var,
            parameters[f"{name}.weight"],
            parameters[f"{name}.bias"],
        )

    def relu(y, i):
        return RoundSTE.apply(F.relu(y), torch.tensor(0.0), ranges[i], 4)

    x = relu(norm(F.conv2d(x, weight("conv1.weight"), padding=1), "bn1"), 0)
    y = F.conv2d(x, weight("conv2.weight"), parameters["conv2.bias"], padding=1)
    y = relu(norm(y, "bn2") + x, 1)
    return F.linear(y.mean((2, 3)), weight("fc.weight"), parameters["fc.bias"])


def test_two_updates_equal_the_textbook(teacher):
    """Weights are rounded anew at each forward, rates decay, momentum is Nesterov's."""
    model = networks.make("Residual")
    batches = list(GeneratorSource(batch=8).stream(teacher, steps=3))
    config = replace(PAPER.tuning, optimizer=SgdConfig(lr=0.05))
    student = build_student(teacher, Scheme(Bits(4, 4), "relu"))
    calibrate_(student, batches[:1], steps=1)
    ranges = [q.scale * 15 for q in student.activations]
    parameters = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    velocity = {n: torch.zeros_like(p) for n, p in parameters.items()}
    tune_(student, teacher, iter(batches[1:]), config, first_step=1, total_steps=3)

    for step, batch in ((1, batches[1]), (2, batches[2])):
        rate = 0.05 * 0.1 ** sum(step >= round(m * 3) for m in (0.25, 0.5, 0.75))
        logits = by_hand(model, parameters, ranges, batch.images)
        p, log_q = (batch.teacher_logits / 20).softmax(1), (logits / 20).log_softmax(1)
        kd = 400 * (p * (p.log() - log_q)).mean()
        loss = F.cross_entropy(logits, batch.labels) + kd
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


def test_labels_are_uniform(teacher):
    batches = GeneratorSource(batch=500).stream(teacher, steps=2)
    counts = torch.cat([b.labels for b in batches]).bincount(minlength=networks.CLASSES)
    assert counts.min() > 150  # 200 expected of each of 5 classes, 12.6 the deviation
    assert counts.sum() == 1000


def test_a_longer_warm_up_leaves_the_student_alone(teacher, tiny):
    import gdfq

    heard = []
    recipe = replace(tiny, calibration=2, warmup=6)
    gdfq.quantize(teacher, networks.images(1), "w4a4", recipe, listener=heard.append)
    stages = [(step.stage, step.index) for step in heard]
    assert stages == [
        *(("calibrate", i) for i in (1, 2)),
        *(("warmup", i) for i in (3, 4, 5, 6)),
        *(("tune", i) for i in (7, 8)),
    ]


def test_features_need_folded_batch_norms(tiny):
    with pytest.raises(ValueError, match="learned"):
        replace(tiny, tuning=replace(tiny.tuning, features=1.0))


def test_learned_quantizers_need_fixed_statistics():
    with pytest.raises(ValueError, match="fixed_statistics"):
        replace(FAST, tuning=replace(FAST.tuning, fixed_statistics=False))
    with pytest.raises(ValueError, match="MINMAX, LSQ or ADAROUND"):
        replace(FAST, quantizers="learnt")


def test_each_kind_of_parameter_has_its_rate(teacher):
    student = build_student(teacher, Scheme(Bits(4, 4), "relu"), quantizers=LSQ)
    optimizer = GridAdam(code_lr=0.1, scale_lr=0.2, other_lr=0.3).build(student)
    rates = {
        id(parameter): group["lr"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    for name, parameter in student.named_parameters():
        kind = name.rpartition(".")[2]
        assert rates[id(parameter)] == {"codes": 0.1, "log_scale": 0.2}.get(kind, 0.3)
    assert len(rates) == len(list(student.parameters()))
    warm = Cosine(warmup=0.5)
    assert [warm.factor(step, 8) for step in (0, 1, 3, 4)] == pytest.approx(
        [share * Cosine().factor(step, 8) for step, share in ((0, 0.25), (1, 0.5), (3, 1), (4, 1))]
    )
    before = optimizer.param_groups[0]["lr"]
    set_rate_(optimizer, Cosine().factor(3, 4))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(before * (0.5 - 0.5 * 0.5**0.5))


def test_a_recipe_must_be_in_order(tiny):
    with pytest.raises(ValueError, match="calibration <= warmup"):
        replace(tiny, calibration=5, warmup=2)
