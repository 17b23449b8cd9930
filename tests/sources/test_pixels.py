"""Images that are optimised pixel by pixel."""

import math
from dataclasses import replace

import pytest
import torch
from support import networks
from support.narrowing import present

from gdfq import UsageError
from gdfq.execution.context import Context
from gdfq.execution.progress import Step
from gdfq.graph.capture import Captured, capture
from gdfq.graph.statistics import StatisticsNetwork
from gdfq.optim import AdamConfig
from gdfq.sources.pixels import OptimisedSource, low_passed


def test_optimised_images_match_the_statistics(teacher: Captured) -> None:
    network = StatisticsNetwork(teacher)
    source = OptimisedSource(batch=16, iterations=60, optimizer=AdamConfig(lr=0.1))
    heard: list[Step] = []
    (batch,) = source.stream(teacher, steps=1, context=Context(listener=heard.append))
    assert float(heard[-1].losses["bns"]) < 0.5 * float(heard[0].losses["bns"])
    assert torch.equal(present(batch.labels), teacher.network(batch.images).argmax(1))
    assert not network.stored[0][0].requires_grad


def test_optimised_images_have_their_labels(teacher: Captured) -> None:
    source = OptimisedSource(batch=20, iterations=60, optimizer=AdamConfig(lr=0.1), class_weight=3)
    (batch,) = source.stream(teacher, steps=1)
    assert present(batch.labels).tolist() == [i % networks.CLASSES for i in range(20)]
    right = (teacher.network(batch.images).argmax(1) == batch.labels).float().mean()
    assert float(right) > 0.6  # by chance 0.2


def test_low_pass_filter_matches_hand_computed_values() -> None:
    """A wave of k cycles per image is multiplied by exp(−k² / 2 D²); a constant is unchanged."""
    x = torch.arange(16) / 16
    for cycles in (0, 1, 5):
        wave = (2 * torch.pi * cycles * x).cos().expand(1, 1, 16, 16)
        expected = wave * math.exp(-(cycles**2) / (2 * 3.0**2))
        torch.testing.assert_close(low_passed(wave, 3.0), expected, rtol=1e-4, atol=1e-5)


def test_finished_images_are_filtered(teacher: Captured) -> None:
    source = OptimisedSource(batch=8, iterations=3)
    (sharp,) = source.stream(teacher, steps=1)
    (smooth,) = replace(source, cutoff=1.5).stream(teacher, steps=1)
    torch.testing.assert_close(smooth.images, low_passed(sharp.images, 1.5))
    assert float(smooth.images.std()) < 0.7 * float(sharp.images.std())
    flat = torch.nn.Sequential(torch.nn.Linear(12, 5), torch.nn.BatchNorm1d(5))
    with pytest.raises(UsageError, match="spatial"):
        replace(source, cutoff=1.0).stream(capture(flat, torch.zeros(2, 12)), steps=1)
