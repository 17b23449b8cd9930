"""Labels and batches."""

from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import networks
from support.narrowing import present
from torch import Tensor

from gdfq.graph.capture import Captured
from gdfq.sources.base import Batch, labels_in_turn
from gdfq.sources.generator import GeneratorSource


def teacher_of(classes: int | None) -> Captured:
    """What `labels_in_turn` asks of a teacher."""
    return cast(Captured, SimpleNamespace(classes=classes, device=torch.device("cpu")))


def labels_of(classes: int, step: int, batch: int) -> list[int]:
    return present(labels_in_turn(teacher_of(classes), step, batch)).tolist()


def test_labels_in_turn_match_a_hand_made_list() -> None:
    assert labels_of(3, 1, 5) == [2, 0, 1, 2, 0]
    assert labels_of(10, 0, 4) == [0, 3, 6, 9]
    assert labels_of(10, 1, 4) == [1, 4, 7, 2]
    assert labels_of(10, 2, 4) == [5, 8, 0, 3]
    assert labels_in_turn(teacher_of(None), 0, 4) is None


@settings(max_examples=50)
@given(classes=st.integers(2, 2000), share=st.floats(0.05, 2))
def test_labels_in_turn_cover_every_class_before_repeating(classes: int, share: float) -> None:
    batch = max(1, round(classes * share))
    steps = range(-(-2 * classes // batch))
    labels = [label for step in steps for label in labels_of(classes, step, batch)]
    assert sorted(labels[:classes]) == list(range(classes))
    assert labels[classes : 2 * classes] == labels[:classes]


def test_sources_are_values() -> None:
    assert replace(GeneratorSource(batch=8), batch=9) == GeneratorSource(batch=9)
    assert hash(GeneratorSource(batch=8)) == hash(GeneratorSource(batch=8))


@pytest.fixture
def images() -> Tensor:
    return torch.randn(64, *networks.SHAPE, generator=torch.Generator().manual_seed(1))


@given(images=st.integers(1, 40), size=st.integers(1, 40))
def test_batch_splits_into_all_of_its_images(images: int, size: int) -> None:
    batch = Batch((torch.arange(images),), torch.arange(images), torch.arange(images))
    parts = batch.split(size)
    assert max(len(part.images) for part in parts) <= size
    for tensors in zip(*((p.images, p.labels, p.teacher_logits) for p in parts), strict=True):
        assert torch.cat(tensors).tolist() == list(range(images))
