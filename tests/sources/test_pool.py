"""Pools of images."""

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from support import networks
from support.narrowing import instance, present
from torch import Tensor

from gdfq.data.datasets import ArrayData
from gdfq.data.preprocessing import Preprocessing
from gdfq.errors import UsageError
from gdfq.execution.context import Context
from gdfq.files.states import Frozen, from_bytes, to_bytes
from gdfq.graph.capture import Captured, capture
from gdfq.recipes import QUICK
from gdfq.sources import collected
from gdfq.sources.augment import prediction_consistency, spread
from gdfq.sources.base import Batch, Source
from gdfq.sources.collected import keeps_half
from gdfq.sources.given import ImageSource, on_images
from gdfq.sources.pool import ImagePool, StoredImages, collect


@pytest.fixture(scope="module")
def teacher() -> Captured:
    return networks.captured("Residual")


@dataclass(frozen=True)
class Counted(Source):
    """A source of images that contain their number."""

    batch: int = 4

    def stream(self, teacher: Captured, *, steps: int, **_: object) -> Iterator[Any]:
        for step in range(steps):
            number = torch.arange(float(self.batch)) + self.batch * step
            images = number.view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
            yield Batch((images,), number.long(), None)


@dataclass(frozen=True)
class Failing(Source):
    """A source whose images must not be made."""

    batch: int = 4

    def stream(self, teacher: Captured, *, steps: int, **_: object) -> Iterator[Any]:
        raise AssertionError("these images were made before")
        yield


def test_pool_gives_each_image_once_per_epoch(teacher: Captured) -> None:
    pool = ImagePool(Counted(), images=10, batch=5)
    batches = list(pool.stream(teacher, steps=4, context=Context(seed=3)))
    for first, second in (batches[:2], batches[2:]):
        labels = torch.cat([present(first.labels), present(second.labels)])
        assert labels.sort().values.tolist() == list(range(10))
        values = torch.cat([first.images, second.images])[:, 0, 0, 0]
        assert torch.equal(values.long(), labels)  # image and label stay together
    assert not torch.equal(present(batches[0].labels), present(batches[2].labels))
    same = list(pool.stream(teacher, steps=4, context=Context(seed=3)))
    assert all(torch.equal(a.images, b.images) for a, b in zip(batches, same, strict=True))


@dataclass(frozen=True)
class Textures(Source):
    """A source of noise."""

    batch: int = 8

    def stream(self, teacher: Captured, *, steps: int, **_: object) -> Iterator[Any]:
        for step in range(steps):
            yield Batch((networks.images(8, seed=step),), torch.zeros(8, dtype=torch.long), None)


class Brightest(torch.nn.Module):
    """A network whose class is the brightest position of an image, or its brightest channel."""

    def __init__(self, where: bool) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm2d(3)
        self.where = where

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return x.sum(1).flatten(1) if self.where else x.amax((2, 3))


@pytest.mark.parametrize("where", [True, False])
def test_pool_augments_images_with_consistent_predictions(where: bool) -> None:
    teacher = capture(Brightest(where).eval(), networks.images(2))
    images, _ = collect(Textures(), teacher, 32)
    known = float(prediction_consistency(teacher, images, torch.Generator().manual_seed(0)))
    assert known < 0.2 if where else known > 0.8
    pool = ImagePool(Textures(), images=32, batch=8)
    drawn = [batch.images for batch in pool.stream(teacher, steps=12)]
    as_made = [
        all(any(torch.equal(image, made) for made in images) for image in batch) for batch in drawn
    ]
    assert all(as_made) if where else sum(as_made) < 6
    never = replace(pool, augmented=False)
    assert (
        all(
            torch.equal(a, b.images)
            for a, b in zip(drawn, never.stream(teacher, steps=12), strict=True)
        )
        == where
    )


def test_images_of_the_whole_pool_are_compared() -> None:
    assert spread(3).tolist() == [0, 1, 2]
    chosen = spread(1024)
    assert len(chosen) == 256
    assert chosen[[0, -1]].tolist() == [0, 1023]
    assert set(chosen.diff().tolist()) == {4, 5}


def test_consistency_is_that_of_the_whole_pool() -> None:
    teacher = capture(Brightest(where=True).eval(), networks.images(2))
    even = torch.zeros(256, *teacher.input_shape)  # nowhere brighter, wherever it is moved
    stored = StoredImages(torch.cat([even, networks.images(768)]), None, batch=64)
    stream = ImagePool(stored, images=1024, batch=8).stream(teacher, steps=1)
    next(stream)
    assert stream.state_dict()["parts"]["moves"] == {"them": False}


def test_large_pools_of_known_pixels_are_kept_in_half_precision(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    captured = capture(Brightest(True).eval(), torch.zeros(2, 3, 224, 224))
    large = replace(captured, input_limits=((-2.0, 2.0),) * 3)
    assert not keeps_half(captured, 446)  # it could hold values that pixels have not
    assert keeps_half(large, 446)  # 256.1 MiB in single precision
    assert not keeps_half(large, 445)

    captured = capture(Brightest(True).eval(), networks.images(2))
    teacher = replace(captured, input_limits=large.input_limits)
    pool = ImagePool(Textures(), images=16, batch=8)
    full = list(pool.stream(teacher, steps=4))
    monkeypatch.setattr("gdfq.sources.collected._HALF_BYTES", 0)
    stream = pool.stream(teacher, steps=4)
    half = [next(stream), next(stream)]
    kept = stream.state_dict()["parts"]["images"]["parts"]
    assert {part.value["inputs"][0].dtype for part in kept} == {torch.float16}
    resumed = pool.stream(teacher, steps=4)
    resumed.load_state_dict(stream.state_dict())
    assert not torch.equal(half[0].images, full[0].images)
    for batch, expected in zip([*half, *resumed], full, strict=True):
        assert torch.equal(batch.images, expected.images.half().float())


def test_pool_augments_images_of_a_network_without_classes() -> None:
    shape = networks.shape_of("Volume")
    teacher = capture(networks.make("Volume"), networks.images(2, shape=shape))
    assert prediction_consistency(teacher, networks.images(4, shape=shape), torch.Generator()) == 1


@pytest.mark.parametrize(
    ("shape", "images", "batch", "at_once"),
    [  # room for 50, 25, 12 and not even one image, in whole batches of 4; or 2^21 pixels a batch
        ((3, 8, 8), 40, 10, 4),
        ((3, 8, 16), 24, 8, 4),
        ((3, 16, 16), 12, 4, 4),
        ((3, 99, 99), 4, 1, 4),
        ((3, 1024, 1024), 2, 1, 2),
        ((3, 2000, 2000), 1, 1, 1),
    ],
)
def test_pool_of_large_images_is_smaller(
    shape: tuple[int, ...], images: int, batch: int, at_once: int
) -> None:
    pool = ImagePool(Counted(), images=40, batch=10, pixels=3200)
    fitted = pool.fitted(shape)
    assert (fitted.images, fitted.batch, fitted.source.batch) == (images, batch, at_once)
    assert replace(pool, batch=1).fitted(shape).batch == 1
    same = replace(pool, pixels=None)
    assert same.fitted(shape) == same
    assert pool.fitted(shape).fitted(shape) == pool.fitted(shape)


@pytest.mark.parametrize(("side", "at_once"), [(32, 128), (128, 128), (129, 64), (224, 32)])
def test_recipe_optimises_fewer_large_images_at_once(side: int, at_once: int) -> None:
    fitted = instance(QUICK.fitted((3, side, side)).source, ImagePool)
    assert (fitted.images, fitted.batch, fitted.source.batch) == (256, 100, at_once)


def test_pool_makes_as_many_images_at_once_as_fit(teacher: Captured) -> None:
    pool = ImagePool(Counted(), images=10, batch=4, pixels=8 * 8 * 9)
    stream = pool.stream(teacher, steps=1)
    assert len(stream.images(9)) == 8
    assert len(stream.images(5)) == 5
    assert len(next(stream).images) == 4
    _, images = pool.made(teacher)
    assert len(images) == 8


def test_pool_resumes_to_the_same_batches(teacher: Captured) -> None:
    """Also without a state of the source; finished images are not made again."""
    pool = ImagePool(Counted(), images=10, batch=5)
    whole = list(pool.stream(teacher, steps=6))
    stopped = pool.stream(teacher, steps=6)
    for _ in range(3):
        next(stopped)
    pieces: dict[str, Frozen] = {}

    def stored(part: Frozen) -> str:
        pieces[str(len(pieces))] = part
        return str(len(pieces) - 1)

    state = from_bytes(to_bytes(stopped.state_dict(), stored), pieces.__getitem__)
    resumed = ImagePool(Failing(), images=10, batch=5).stream(teacher, steps=6)
    resumed.load_state_dict(state)
    for batch, expected in zip(resumed, whole[3:], strict=True):
        assert torch.equal(batch.images, expected.images)
        assert batch.images.stride() == expected.images.stride()
        assert torch.equal(present(batch.labels), present(expected.labels))


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 24), (1, 8, 8, 8)])
def test_drawn_batch_is_made_again_of_its_origin(shape: tuple[int, ...]) -> None:
    noise = networks.images(12, shape=shape)
    stored = StoredImages(noise, torch.arange(12) % 5, 4)
    name = {2: "Audio", 3: "Residual", 4: "Volume"}[len(shape)]
    teacher = networks.captured(name)
    stream = ImagePool(stored, images=12, batch=4).stream(teacher, steps=5)
    for batch in stream:
        again = stream.made_again(batch.origin)
        assert torch.equal(again.images, batch.images)
        assert again.images.stride() == batch.images.stride()
        assert (
            sum(tensor.nbytes for tensor in again.origin.values() if torch.is_tensor(tensor)) < 99
        )


def test_collect_takes_the_first_images(teacher: Captured) -> None:
    images, labels = collect(Counted(), teacher, 6)
    assert present(labels).tolist() == [0, 1, 2, 3, 4, 5]
    assert images.shape == (6, 3, 8, 8)


def test_given_images_fill_the_pool() -> None:
    images = torch.randint(256, (7, 1, 8, 8)).byte()
    data = ArrayData(images, torch.arange(7))
    empty = ImagePool(Counted(), images=10, batch=5)
    pool = instance(on_images(empty, data, Preprocessing((0.0,), (1.0,))), ImagePool)
    assert pool.images == 7
    assert instance(pool.source, ImageSource).data is data


def test_images_of_a_pool_are_freed_while_they_are_joined(
    teacher: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def batch() -> Batch:
        images = torch.randn(2, 3, 8, 8)
        made.append(weakref.ref(images))
        return Batch((images,), None, None)

    @dataclass(frozen=True)
    class Fresh(Source):
        batch: int = 2

        def stream(self, *_: Any, **__: Any) -> Iterator[Batch]:
            return (batch() for _ in range(3))

    def count() -> None:
        alive.append(sum(tensor() is not None for tensor in made))

    monkeypatch.setattr(collected, "release_freed_memory", count)
    next(ImagePool(Fresh(), images=6, batch=2).stream(teacher, steps=1))
    assert alive[0] < 3
    assert alive[-1] == 0


@pytest.mark.parametrize("second", [torch.ones(2, 1, 8, 8), torch.ones(2, 3, 8, 8).double()])
def test_batches_of_other_shapes_or_dtypes_are_refused(teacher: Captured, second: Tensor) -> None:
    @dataclass(frozen=True)
    class Mixed(Source):
        batch: int = 2

        def stream(self, *_: Any, **__: Any) -> Iterator[Batch]:
            return iter([Batch((x,), None, None) for x in (torch.ones(2, 3, 8, 8), second)])

    with pytest.raises(UsageError, match="one shape and dtype"):
        next(ImagePool(Mixed(), images=4, batch=2).stream(teacher, steps=1))
