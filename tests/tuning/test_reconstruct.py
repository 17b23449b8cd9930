"""Blocks, their reconstruction, learned rounding, and the correction of channels."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support import networks
from torch import fx, nn

from gdfq import UsageError
from gdfq.execution.context import Context
from gdfq.functional.grid import Bits, Layout
from gdfq.functional.losses import feature_loss
from gdfq.graph.batch_norms import fold_batch_norms
from gdfq.graph.blocks import block_ends, blocks
from gdfq.graph.capture import capture
from gdfq.optim import SgdConfig
from gdfq.quantizers.adaround import RoundedWeight
from gdfq.quantizers.base import QDrop
from gdfq.quantizers.family import ADAROUND, LSQ, MINMAX
from gdfq.recipes import FAST, GENIE
from gdfq.sources.base import Batch
from gdfq.student.build import build_student
from gdfq.student.freeze import freeze
from gdfq.student.scheme import Scheme
from gdfq.tuning.calibrate import calibrate_
from gdfq.tuning.distill import tune_
from gdfq.tuning.grid_adam import GridAdam
from gdfq.tuning.moment_matching import match_moments_
from gdfq.tuning.reconstruct import Reconstruction, reconstruct_


@pytest.fixture
def images():
    return torch.randn(64, *networks.SHAPE, generator=torch.Generator().manual_seed(1))


def student_of(teacher, images, bits="w3a3", quantizers=LSQ):
    student = build_student(teacher, Scheme(Bits.parse(bits), "relu"), quantizers=quantizers)
    calibrate_(student, [Batch((images,), None, None)], steps=1)
    return student


def test_blocks_one_after_the_other_are_the_network(teacher, images):
    student = student_of(teacher, images)
    folded = fold_batch_norms(teacher).network
    ends = block_ends(folded.graph)
    for network, nodes in (
        (folded, ends),
        (student.network, student.named([end.name for end in ends])),
    ):
        parts = blocks(network, nodes)
        assert len(parts) == len(ends) + 1 > 2
        x = images
        for part in parts:
            x = part(x)
        assert torch.equal(x, network(images))
    owned = {id(p) for part in blocks(student.network, nodes) for p in part.parameters()}
    assert owned == {id(p) for p in student.parameters()}  # shared, none lost


def test_matched_moments_are_the_teachers_at_every_layer(teacher, images):
    student = student_of(teacher, images)
    before = layer_moments(student.network, images)
    match_moments_(student, teacher, (images,))
    after = layer_moments(student.network, images)
    wanted = layer_moments(fold_batch_norms(teacher).network, images)
    assert len(wanted) == 3
    for name, goal in wanted.items():
        torch.testing.assert_close(after[name], goal, rtol=1e-3, atol=1e-4)
        error, old = (float((m[name] - goal).abs().max()) for m in (after, before))
        assert old > 10 * error  # there was something to do
    # What was corrected is what is frozen.
    assert distance(freeze(student)(images), student(images)) < 0.03


def distance(got, wanted):
    """Of logits, relative: freezing rounds the biases, which moves some activations by a step."""
    return float((got - wanted).detach().norm() / wanted.detach().norm())


def layer_moments(network, images):
    """Mean and deviation of each layer's output channels, by the layer's name."""
    found = {}

    class Look(fx.Interpreter):
        def run_node(self, n):
            value = super().run_node(n)
            if n.op == "call_function" and ("conv" in str(n.target) or "linear" in str(n.target)):
                others = [d for d in range(value.ndim) if d != 1]
                found[n.name] = torch.stack([value.mean(others), value.std(others, correction=0)])
            return value

    with torch.no_grad():
        Look(network).run(images)
    return found


def test_channels_that_do_not_vary_keep_their_scale(teacher, images):
    """One image has no deviation at the logits: only the mean can be matched there."""
    one = images[:1]
    student = student_of(teacher, one, "w8a8")
    steps = student.network.fake_weight.linear.scale.clone()
    match_moments_(student, teacher, (one,))
    assert torch.equal(student.network.fake_weight.linear.scale, steps)
    torch.testing.assert_close(student(one), teacher.network(one), rtol=1e-3, atol=1e-3)


def test_moments_by_hand():
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


@pytest.mark.parametrize("at_once", [10, 33])  # parts of equal and of different length
def test_large_images_pass_in_parts_with_the_same_gradient(teacher, images, monkeypatch, at_once):
    batch = Batch((images,), torch.zeros(len(images), dtype=torch.long), None)
    # Features are relative to each part's own; the rest is exactly a mean over images.
    config = replace(FAST.tuning, features=0.0, optimizer=SgdConfig(lr=0.0))
    gradients, losses = [], []
    for number in (1000, at_once):
        monkeypatch.setattr("gdfq.tuning.distill._MAX_FEATURE_BYTES", 4 * 8 * 64 * number)
        student = student_of(teacher, images)
        tune_(student, teacher, [batch], config, first_step=0, total_steps=1, context=Context(listener=losses.append))  # fmt: skip
        gradients.append([p.grad.clone() for p in student.parameters() if p.grad is not None])
    assert float(losses[0].losses["student"]) == pytest.approx(float(losses[1].losses["student"]), rel=1e-5)  # fmt: skip
    for whole, parts in zip(*gradients, strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-5)


@given(images=st.integers(1, 40), size=st.integers(1, 40))
def test_a_batch_splits_into_all_of_its_images(images, size):
    batch = Batch((torch.arange(images),), torch.arange(images), torch.arange(images))
    parts = batch.split(size)
    assert max(len(part.images) for part in parts) <= size
    for tensors in zip(*((p.images, p.labels, p.teacher_logits) for p in parts), strict=True):
        assert torch.cat(tensors).tolist() == list(range(images))


@settings(deadline=None)
@given(seed=st.integers(0, 2**31), bits=st.integers(2, 8))
def test_rounding_starts_at_the_weight_and_ends_beside_it(seed, bits):
    weight = torch.randn(3, 2, 3, 3, generator=torch.Generator().manual_seed(seed))
    quantizer = RoundedWeight(weight, bits, Layout.ROWS)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    exact = weight / quantizer.scale + quantizer.zero_point
    inside = (exact > low) & (exact < high)
    soft = quantizer(weight)
    torch.testing.assert_close(soft[inside], weight[inside], rtol=1e-3, atol=1e-3)
    quantizer.settled = True
    hard = quantizer(weight).detach()
    frozen = quantizer.quantized(weight)
    torch.testing.assert_close((frozen.codes - frozen.zero_point) * frozen.scale, hard)
    assert bool(((hard - weight)[inside].abs() <= 0.5001 * quantizer.scale.expand_as(weight)[inside]).all())  # fmt: skip


def test_rounding_penalty_by_hand():
    quantizer = RoundedWeight(torch.tensor([[0.0, 1.0]]), 2, Layout.ROWS)
    quantizer.rounding_logits.data = torch.tensor([[0.0, 100.0]])  # h = 0.5 and 1
    assert quantizer.rounding().tolist() == [[0.5, 1.0]]
    assert float(quantizer.rounding_penalty(2.0).detach()) == 1.0
    quantizer.rounding_logits.data = torch.tensor([[0.5, -100.0]])
    h = 1.2 / (1 + torch.tensor(-0.5).exp()) - 0.1
    assert float(quantizer.rounding_penalty(3.0).detach()) == pytest.approx(
        1 - abs(2 * float(h) - 1) ** 3
    )


def test_bypass_lets_its_share_through():
    through, otherwise = torch.ones(100, 100), torch.zeros(100, 100)
    mixed = QDrop(0.3, torch.Generator().manual_seed(0))(through, otherwise)
    assert float(mixed.mean()) == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("quantizers", [LSQ, ADAROUND], ids=lambda family: family.name)
def test_reconstruction_brings_each_block_nearer(teacher, images, quantizers):
    student = student_of(teacher, images, "w2a4", quantizers)
    wanted = teacher.network(images)
    before = F.mse_loss(freeze(student)(images), wanted)
    config = Reconstruction(GridAdam(0.02, 1e-3, 1e-3, 0.05), images=64, batch=16, rounding=1e-3)
    seen = []
    batches = Batch((images,), torch.zeros(64, dtype=torch.long), None).split(16)
    reconstruct_(
        student, teacher, batches, config, updates=60, context=Context(listener=seen.append)
    )
    frozen = freeze(student)
    assert float(F.mse_loss(frozen(images), wanted)) < 0.7 * float(before)
    assert distance(frozen(images), student(images)) < 0.03
    assert all(module.dropping is None for module in student.activations)
    assert [step.index for step in seen] == list(range(1, len(seen) + 1))


def test_what_a_recipe_may_combine():
    for change in ({"quantizers": MINMAX}, {"tuning": FAST.tuning}, {"warmup": 700}):
        with pytest.raises(UsageError, match="learned by reconstruction"):
            replace(GENIE, **change)
    with pytest.raises(UsageError, match="learned weights"):
        replace(GENIE, match_moments=True)


class Twice(nn.Module):
    """One convolution in two blocks."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.shared = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        x = F.relu(self.shared(self.stem(x)))
        x = F.relu(self.shared(x))
        return self.head(x.mean((2, 3)))


def test_what_blocks_share_is_trained_in_the_first(images):
    torch.manual_seed(0)
    teacher = capture(Twice().eval(), images[:2])
    student = student_of(teacher, images, quantizers=ADAROUND)
    config = Reconstruction(GridAdam(0.0, 0.01, 0.0, 0.05), images=64, batch=8)
    steps = []

    def listener(step):
        steps.append(student.network.fake_weight.conv2d_1.log_scale.detach().clone())

    batches = [Batch((images,), None, None)]
    reconstruct_(student, teacher, batches, config, updates=10, context=Context(listener=listener))
    assert len(steps) == 40  # stem, shared, shared again, head
    assert not torch.equal(steps[10], steps[19])
    assert torch.equal(steps[19], steps[-1])


class Masked(nn.Module):
    """A mask of the input that is used behind the first block."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(2))
        self.head = nn.Linear(3, 5)

    def forward(self, x):
        mask = x > 0
        y = F.relu(self.second(F.relu(self.first(x))))
        return self.head(torch.where(mask, y, torch.zeros_like(y)).mean((2, 3)))


def test_no_block_ends_while_anything_else_is_alive(images):
    torch.manual_seed(0)
    network = capture(Masked().eval(), images[:2]).network
    x = images
    for part in blocks(network, block_ends(network.graph)):
        x = part(x)
    assert torch.equal(x, network(images))


def test_feature_errors_have_the_right_gradient():
    for shape in ((4, 5), (3, 4, 5), (2, 3, 4, 5)):
        seen, wanted = torch.randn(2, *shape, dtype=torch.double)
        if len(shape) == 4:
            seen = seen.contiguous(memory_format=torch.channels_last)
        seen.requires_grad_()
        assert torch.autograd.gradcheck(lambda a, b=wanted: feature_loss([a, a], [b, b + 1]), seen)


def test_the_regulariser_decides_roundings_and_values_bypass(teacher, images, monkeypatch):
    undecided, mixed = {}, []
    settle = QDrop.__call__
    monkeypatch.setattr(QDrop, "__call__", lambda *a: mixed.append(a[1].shape) or settle(*a))
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
