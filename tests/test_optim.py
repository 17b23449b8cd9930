"""Schedules of learning rates."""

import pytest
import torch

from gdfq.optim import SgdConfig, StepDecay, set_rate_


def test_learning_rate_follows_the_published_steps() -> None:
    optimizer = SgdConfig(lr=1e-4).build(torch.nn.Linear(1, 1))
    rates = []
    for epoch in (0, 99, 100, 199, 200, 300, 399):
        set_rate_(optimizer, StepDecay().factor(epoch * 200, 400 * 200))
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1e-4, 1e-4, 1e-5, 1e-5, 1e-6, 1e-7, 1e-7])
    (group,) = optimizer.param_groups
    assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.9, True, 1e-4)
