import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support import networks

from gdfq import UsageError
from gdfq.data.datasets import ArrayData
from gdfq.data.preprocessing import Preprocessing
from gdfq.errors import GdfqError
from gdfq.execution.context import Context
from gdfq.execution.seeding import stream
from gdfq.functional.upsample_conv import upsampled_convolution
from gdfq.graph.capture import capture
from gdfq.graph.statistics import StatisticsNetwork
from gdfq.optim import AdamConfig, SgdConfig, StepDecay, set_rate_
from gdfq.sources.base import Batch, labels_in_turn
from gdfq.sources.generator import Generator, GeneratorSource
from gdfq.sources.given import GivenImages, ImageSource
from gdfq.sources.latent import LatentSource, swinging
from gdfq.sources.pixels import OptimisedSource, low_passed
from gdfq.sources.stream import Feed, Stream


def labels_of(classes, step, batch):
    knows = SimpleNamespace(classes=classes, device=torch.device("cpu"))
    return labels_in_turn(knows, step, batch).tolist()


def test_labels_come_in_turn_by_hand():
    assert labels_of(3, 1, 5) == [2, 0, 1, 2, 0]
    assert labels_of(10, 0, 4) == [0, 3, 6, 9]
    assert labels_of(10, 1, 4) == [1, 4, 7, 2]
    assert labels_of(10, 2, 4) == [5, 8, 0, 3]
    assert labels_in_turn(SimpleNamespace(classes=None), 0, 4) is None


@settings(max_examples=50)
@given(classes=st.integers(2, 2000), share=st.floats(0.05, 2))
def test_labels_meet_every_class_before_one_again(classes, share):
    batch = max(1, round(classes * share))
    steps = range(-(-2 * classes // batch))
    labels = [label for step in steps for label in labels_of(classes, step, batch)]
    assert sorted(labels[:classes]) == list(range(classes))
    assert labels[classes : 2 * classes] == labels[:classes]


FORMS = ("label-embedding", "conditional-batch-norm")


@pytest.mark.parametrize("shape", [(2, 3, 4, 6), (1, 1, 1, 1), (3, 2, 7, 2)])
def test_upsampled_convolution_is_exact(shape):
    random = torch.Generator().manual_seed(0)
    n, i, h, w = shape
    x, weight, bias, grad = (
        torch.randn(*s, dtype=torch.double, generator=random)
        for s in (shape, (5, i, 3, 3), (5,), (n, 5, 2 * h, 2 * w))
    )
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    expected = F.conv2d(F.interpolate(x, scale_factor=2), weight, bias, padding=1)
    got = upsampled_convolution(x, weight, bias)
    assert torch.allclose(got, expected)
    for a, b in zip(
        torch.autograd.grad(got, inputs, grad),
        torch.autograd.grad(expected, inputs, grad),
        strict=True,
    ):
        assert torch.allclose(a, b)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 8, 8), (4, 10, 13), (3, 5, 4)])
def test_generated_images_have_the_shape_and_unit_statistics(form, shape):
    classes = 7
    generator = Generator(
        shape, classes, latent=100, conditioning=form, random=stream(0, "generator.init")
    )
    z = torch.randn(50, 100, generator=stream(0, "z"))
    images = generator(z, torch.arange(50) % classes)
    assert images.shape == (50, *shape)
    if not any(s % 4 for s in shape[1:]):  # cropping moves the statistics a little
        variance, mean = torch.var_mean(images, (0, 2, 3), correction=0)
        assert torch.allclose(mean, torch.zeros(shape[0]), atol=1e-4)
        assert torch.allclose(variance, torch.ones(shape[0]), atol=1e-2)


@pytest.mark.parametrize("form", FORMS)
def test_the_class_decides_the_image(form):
    generator = Generator((3, 8, 8), 4, latent=100, conditioning=form, random=stream(0, "i"))
    if form == "conditional-batch-norm":  # all classes start alike, as published
        with torch.no_grad():
            generator.norms[0].scale[1] *= 2
    z = torch.randn(1, 100, generator=stream(0, "z")).expand(8, 100)
    images = generator(z, torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]))
    assert torch.allclose(images[0], images[3], atol=1e-5)
    assert not torch.allclose(images[0], images[4], atol=1e-2)


def test_the_published_architecture_has_the_published_sizes():
    generator = Generator(
        (3, 32, 32), 10, latent=100, conditioning="label-embedding", random=stream(0, "i")
    )
    # embedding 10·100; linear 100·8192+8192; BN 2·128, 2·128, 2·64; convolutions 128→128→64→3.
    expected = 1000 + 827_392 + 640 + (128 * 128 * 9 + 128) + (64 * 128 * 9 + 64) + (3 * 64 * 9 + 3)
    assert sum(p.numel() for p in generator.parameters()) == expected


@pytest.mark.parametrize(
    ("alone", "loss", "share"),
    [({"class_boundary": 0.0}, "bns", 0.5), ({"statistics": 0.0}, "boundary", 0.93)],
)
def test_the_generator_learns_each_part_of_the_teachers_knowledge(teacher, alone, loss, share):
    stream = GeneratorSource(batch=32, **alone).stream(teacher, steps=150)
    values = [float(batch.losses[loss]) for batch in stream]
    assert sum(values[-10:]) < share * sum(values[:10])


def test_batches_are_detached_and_carry_the_teachers_answers(teacher):
    (batch,) = GeneratorSource(batch=32).stream(teacher, steps=1)
    assert set(batch.losses) == {"generator", "bns", "boundary"}
    assert torch.allclose(batch.teacher_logits, teacher.network(batch.images), atol=1e-4)
    assert not batch.images.requires_grad
    assert not batch.teacher_logits.requires_grad


def test_the_loss_is_the_weighted_sum(teacher):
    (batch,) = GeneratorSource(batch=8, class_boundary=2.0, statistics=0.5).stream(teacher, steps=1)
    losses = {name: float(value) for name, value in batch.losses.items()}
    assert losses["generator"] == pytest.approx(2 * losses["boundary"] + 0.5 * losses["bns"])


def test_a_consumer_without_gradients_does_not_stop_the_generator(teacher):
    def run():
        return [b.images for b in GeneratorSource(batch=8).stream(teacher, steps=4)]

    with torch.no_grad():
        inside = run()
    assert torch.is_grad_enabled()
    for a, b in zip(inside, run(), strict=True):
        assert torch.equal(a, b)


def test_alternating_separate_and_stopped(teacher):
    """The published schedule trains at each step; the ablations differ only in when."""

    def losses(**changes):
        source = GeneratorSource(batch=8, **changes)
        return [float(b.losses["bns"]) for b in source.stream(teacher, steps=12)]

    published = losses()
    assert losses(stop=0.5)[:7] == published[:7]
    assert losses(stop=0.5)[8:] != published[8:]
    heard = []
    source = GeneratorSource(batch=8, head_start=1.0, stop=0.0)
    batches = list(source.stream(teacher, steps=12, context=Context(listener=heard.append)))
    assert len(batches) == 12
    assert [float(s.losses["bns"]) for s in heard] == published


def test_a_loss_that_is_not_finite_stops_the_generator(teacher):
    source = GeneratorSource(batch=8, optimizer=AdamConfig(lr=float("inf")))
    with pytest.raises(GdfqError, match="must stay finite"):
        list(source.stream(teacher, steps=3))


def test_the_generator_needs_images_and_batch_norms():
    plain = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 5))
    with pytest.raises(UsageError, match="has none"):
        next(GeneratorSource(batch=8).stream(capture(plain, networks.images(1)), steps=1))
    flat = capture(torch.nn.Sequential(torch.nn.Linear(12, 5)), torch.zeros(1, 12))
    with pytest.raises(UsageError, match="makes images"):
        next(GeneratorSource(batch=8).stream(flat, steps=1))


def test_optimised_images_match_the_statistics(teacher):
    network = StatisticsNetwork(teacher)
    source = OptimisedSource(batch=16, iterations=60, optimizer=AdamConfig(lr=0.1))
    heard = []
    (batch,) = source.stream(teacher, steps=1, context=Context(listener=heard.append))
    assert float(heard[-1].losses["bns"]) < 0.5 * float(heard[0].losses["bns"])
    assert torch.equal(batch.labels, teacher.network(batch.images).argmax(1))
    assert not network.stored[0][0].requires_grad


def test_optimised_images_learn_their_labels(teacher):
    source = OptimisedSource(batch=20, iterations=60, optimizer=AdamConfig(lr=0.1), class_weight=3)
    (batch,) = source.stream(teacher, steps=1)
    assert batch.labels.tolist() == [i % networks.CLASSES for i in range(20)]
    right = (teacher.network(batch.images).argmax(1) == batch.labels).float().mean()
    assert float(right) > 0.6  # by chance 0.2


def test_the_low_pass_filter_by_hand():
    """A wave of k cycles an image comes out exp(−k² / 2 D²) times as high; a constant as it is."""
    x = torch.arange(16) / 16
    for cycles in (0, 1, 5):
        wave = (2 * torch.pi * cycles * x).cos().expand(1, 1, 16, 16)
        expected = wave * math.exp(-(cycles**2) / (2 * 3.0**2))
        torch.testing.assert_close(low_passed(wave, 3.0), expected, rtol=1e-4, atol=1e-5)


def test_latents_and_their_generator_reach_for_the_statistics(teacher):
    source = LatentSource(batch=16, iterations=30)
    heard = []
    first, second = source.stream(teacher, steps=2, context=Context(listener=heard.append))
    assert first.images.shape == (16, *networks.SHAPE)
    assert float(heard[29].losses["bns"]) < 0.7 * float(heard[0].losses["bns"])
    assert torch.equal(first.labels, teacher.network(first.images).argmax(1))
    assert not torch.equal(first.images, second.images)
    (still,) = replace(source, latents=AdamConfig(lr=0.0)).stream(teacher, steps=1)
    assert not torch.allclose(first.images, still.images)  # latents learn too
    (again,) = source.stream(teacher, steps=1)
    assert torch.equal(first.images, again.images)


def test_finished_images_are_filtered(teacher):
    source = OptimisedSource(batch=8, iterations=3)
    (sharp,) = source.stream(teacher, steps=1)
    (smooth,) = replace(source, cutoff=1.5).stream(teacher, steps=1)
    torch.testing.assert_close(smooth.images, low_passed(sharp.images, 1.5))
    assert float(smooth.images.std()) < 0.7 * float(sharp.images.std())
    flat = torch.nn.Sequential(torch.nn.Linear(12, 5), torch.nn.BatchNorm1d(5))
    with pytest.raises(UsageError, match="spatial"):
        replace(source, cutoff=1.0).stream(capture(flat, torch.zeros(2, 12)), steps=1)


def test_swinging_moves_the_inputs_of_strided_convolutions_alone():
    strided = torch.nn.Conv2d(1, 1, 2, stride=2, bias=False)
    plain = torch.nn.Conv2d(1, 1, 3, padding=1, bias=False)
    strided.weight.data.fill_(1)
    network = torch.nn.Sequential(plain, strided, torch.nn.Flatten())
    teacher = capture(network, torch.zeros(1, 1, 8, 8))
    x = torch.randn(1, 1, 8, 8)
    swung = swinging(teacher, torch.Generator().manual_seed(0))
    outputs = {tuple(swung.network(x)[0].tolist()) for _ in range(60)}
    assert len(outputs) == 9  # offsets −1, 0, 1 along each axis
    inner = plain(x).detach()
    padded = F.pad(inner, [1] * 4, mode="reflect")
    windows = {
        tuple(strided(padded[:, :, i : i + 8, j : j + 8]).flatten().tolist())
        for i in range(3)
        for j in range(3)
    }
    assert {tuple(round(v, 4) for v in o) for o in outputs} == {
        tuple(round(v, 4) for v in w) for w in windows
    }


def test_given_images_come_once_an_epoch_in_a_seeded_order(teacher):
    images = networks.images(10)
    data = ArrayData(images, torch.arange(10) % 5)
    source = ImageSource(data, Preprocessing.of(3, None, None), batch=4)
    batches = list(source.stream(teacher, steps=3))
    assert [len(b.labels) for b in batches] == [4, 4, 2]
    seen = torch.cat([b.images for b in batches])
    assert torch.equal(seen[:, 0, 0, 0].sort().values, images[:, 0, 0, 0].sort().values)
    again = list(source.stream(teacher, steps=3))
    assert torch.equal(again[0].images, batches[0].images)
    other = next(source.stream(teacher, steps=1, context=Context(seed=1)))
    assert not torch.equal(other.images, batches[0].images)


def test_labels_of_given_images_default_to_the_teachers(teacher):
    source = ImageSource(ArrayData(networks.images(4), None), Preprocessing.of(3, None, None), 4)
    (batch,) = source.stream(teacher, steps=1)
    assert torch.equal(batch.labels, batch.teacher_logits.argmax(1))


def test_a_recipe_for_real_images_without_them_is_refused(teacher):
    with pytest.raises(UsageError, match="--data"):
        GivenImages(4).stream(teacher, steps=1)


def test_published_learning_rate_steps():
    optimizer = SgdConfig(lr=1e-4).build(torch.nn.Linear(1, 1))
    rates = []
    for epoch in (0, 99, 100, 199, 200, 300, 399):
        set_rate_(optimizer, StepDecay().factor(epoch * 200, 400 * 200))
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1e-4, 1e-4, 1e-5, 1e-5, 1e-6, 1e-7, 1e-7])
    (group,) = optimizer.param_groups
    assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.9, True, 1e-4)


def test_sources_are_values():
    assert replace(GeneratorSource(batch=8), batch=9) == GeneratorSource(batch=9)
    assert hash(GeneratorSource(batch=8)) == hash(GeneratorSource(batch=8))


def test_a_feed_shows_its_first_batch_before_it_hands_it_out():
    def numbered(count):
        def make(step):
            return Batch((torch.full((40, 1), float(step)),), None, None)

        return Stream(make, count, [])

    feed = Feed(numbered(5), torch.device("cpu"))
    feed.begin()
    assert feed.taken == 0
    (examples,) = feed.examples
    assert examples.shape == (32, 1)
    assert examples.eq(0).all()
    stopped = feed.state_dict()
    resumed = Feed(numbered(5), torch.device("cpu"))
    without_state = Feed(iter(list(numbered(5))), torch.device("cpu"))
    for again in (resumed, without_state):
        again.load_state_dict(stopped)
    for again in (feed, resumed, without_state):
        again.begin()  # nothing is taken twice
        assert [float(batch.images[0]) for batch in again.until(3)] == [0, 1, 2]
        assert [float(batch.images[0]) for batch in again.until(9)] == [3, 4]
        assert again.taken == 5
