"""The conditional generator and its losses."""

from typing import Any

import pytest
import torch
from support import networks
from support.narrowing import instance, present
from torch import Tensor, nn

from gdfq import UsageError
from gdfq.errors import GdfqError
from gdfq.execution.context import Context
from gdfq.execution.progress import Step
from gdfq.execution.seeding import stream
from gdfq.graph.capture import Captured, capture
from gdfq.optim import AdamConfig
from gdfq.sources.generator import Generator, GeneratorSource

FORMS = ("label-embedding", "conditional-batch-norm")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 8, 8), (4, 10, 13), (3, 5, 4)])
def test_generated_images_have_the_input_shape_and_unit_statistics(
    form: Any, shape: tuple[int, ...]
) -> None:
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
def test_generated_image_depends_on_its_class(form: Any) -> None:
    generator = Generator((3, 8, 8), 4, latent=100, conditioning=form, random=stream(0, "i"))
    if form == "conditional-batch-norm":  # all classes start alike, as published
        with torch.no_grad():
            instance(instance(generator.norms[0], nn.Module).scale, Tensor)[1] *= 2
    z = torch.randn(1, 100, generator=stream(0, "z")).expand(8, 100)
    images = generator(z, torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]))
    assert torch.allclose(images[0], images[3], atol=1e-5)
    assert not torch.allclose(images[0], images[4], atol=1e-2)


def test_generator_has_the_published_sizes() -> None:
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
def test_generator_reduces_each_loss_alone(
    teacher: Captured, alone: dict[str, Any], loss: str, share: float
) -> None:
    stream = GeneratorSource(batch=32, **alone).stream(teacher, steps=150)
    values = [float(batch.losses[loss]) for batch in stream]
    assert sum(values[-10:]) < share * sum(values[:10])


def test_batches_are_detached_and_have_teacher_logits(teacher: Captured) -> None:
    (batch,) = GeneratorSource(batch=32).stream(teacher, steps=1)
    assert set(batch.losses) == {"generator", "bns", "boundary"}
    assert torch.allclose(present(batch.teacher_logits), teacher.network(batch.images), atol=1e-4)
    assert not batch.images.requires_grad
    assert not present(batch.teacher_logits).requires_grad


def test_generator_loss_is_the_weighted_sum(teacher: Captured) -> None:
    (batch,) = GeneratorSource(batch=8, class_boundary=2.0, statistics=0.5).stream(teacher, steps=1)
    losses = {name: float(value) for name, value in batch.losses.items()}
    assert losses["generator"] == pytest.approx(2 * losses["boundary"] + 0.5 * losses["bns"])


def test_generator_learns_under_no_grad(teacher: Captured) -> None:
    def run() -> list[Tensor]:
        return [b.images for b in GeneratorSource(batch=8).stream(teacher, steps=4)]

    with torch.no_grad():
        inside = run()
    assert torch.is_grad_enabled()
    for a, b in zip(inside, run(), strict=True):
        assert torch.equal(a, b)


def test_generator_alternates_separates_and_stops(teacher: Captured) -> None:
    """The published schedule trains at each step; the ablations differ only in when."""

    def losses(**changes: Any) -> list[float]:
        source = GeneratorSource(batch=8, **changes)
        return [float(b.losses["bns"]) for b in source.stream(teacher, steps=12)]

    published = losses()
    assert losses(stop=0.5)[:7] == published[:7]
    assert losses(stop=0.5)[8:] != published[8:]
    heard: list[Step] = []
    source = GeneratorSource(batch=8, head_start=1.0, stop=0.0)
    batches = list(source.stream(teacher, steps=12, context=Context(listener=heard.append)))
    assert len(batches) == 12
    assert [float(s.losses["bns"]) for s in heard] == published


def test_generator_stops_when_a_loss_is_not_finite(teacher: Captured) -> None:
    source = GeneratorSource(batch=8, optimizer=AdamConfig(lr=float("inf")))
    with pytest.raises(GdfqError, match="must stay finite"):
        list(source.stream(teacher, steps=3))


def test_generator_needs_images_and_batch_norms() -> None:
    plain = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 5))
    with pytest.raises(UsageError, match="has none"):
        next(GeneratorSource(batch=8).stream(capture(plain, networks.images(1)), steps=1))
    flat = capture(torch.nn.Sequential(torch.nn.Linear(12, 5)), torch.zeros(1, 12))
    with pytest.raises(UsageError, match="makes images"):
        next(GeneratorSource(batch=8).stream(flat, steps=1))


def test_generated_labels_are_uniform(teacher: Captured) -> None:
    batches = GeneratorSource(batch=500).stream(teacher, steps=2)
    counts = torch.cat([present(b.labels) for b in batches]).bincount(minlength=networks.CLASSES)
    assert counts.min() > 150  # 200 expected of each of 5 classes, 12.6 the deviation
    assert counts.sum() == 1000
