"""Given images in place of synthetic ones."""

import pytest
import torch
from support import networks
from support.narrowing import present

from gdfq import UsageError
from gdfq.data.datasets import ArrayData
from gdfq.data.preprocessing import Preprocessing
from gdfq.execution.context import Context
from gdfq.graph.capture import Captured
from gdfq.sources.given import GivenImages, ImageSource


def test_given_images_come_once_per_epoch_in_a_seeded_order(teacher: Captured) -> None:
    images = networks.images(10)
    data = ArrayData(images, torch.arange(10) % 5)
    source = ImageSource(data, Preprocessing.of(3, None, None), batch=4)
    batches = list(source.stream(teacher, steps=3))
    assert [len(present(b.labels)) for b in batches] == [4, 4, 2]
    seen = torch.cat([b.images for b in batches])
    assert torch.equal(seen[:, 0, 0, 0].sort().values, images[:, 0, 0, 0].sort().values)
    again = list(source.stream(teacher, steps=3))
    assert torch.equal(again[0].images, batches[0].images)
    other = next(source.stream(teacher, steps=1, context=Context(seed=1)))
    assert not torch.equal(other.images, batches[0].images)


def test_given_images_without_labels_get_those_of_the_teacher(teacher: Captured) -> None:
    source = ImageSource(ArrayData(networks.images(4), None), Preprocessing.of(3, None, None), 4)
    (batch,) = source.stream(teacher, steps=1)
    assert torch.equal(present(batch.labels), present(batch.teacher_logits).argmax(1))


def test_recipe_for_real_images_needs_data(teacher: Captured) -> None:
    with pytest.raises(UsageError, match="--data"):
        GivenImages(4).stream(teacher, steps=1)
