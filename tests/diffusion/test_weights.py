"""Weights of a denoiser's errors by time step."""

from typing import Any

import pytest
import torch
from support.denoisers import SHAPE, tiny_denoiser
from support.plain_scheduler import PlainConfig

from gdfq.diffusion.scheduler import SchedulerConfig
from gdfq.diffusion.weights import MinSnr
from gdfq.functional.losses import feature_loss
from gdfq.optim import SgdConfig
from gdfq.plan.resolve import resolve
from gdfq.tuning.distill import Distillation

DDIM = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 2,
    "trained_betas": [0.1, 0.5],
    "prediction_type": "sample",
}


@pytest.mark.needs("diffusers")
def test_weights_follow_the_noise_of_the_scheduler() -> None:
    # The signals are 0.9 and 0.45, so the ratios 9 and 9/11.
    times = torch.tensor([1.2, 0.0, 7.0])
    assert MinSnr(SchedulerConfig.of(DDIM)).weights(times).tolist() == pytest.approx(
        [9 / 11, 5.0, 9 / 11]
    )
    noise = SchedulerConfig.of({**DDIM, "prediction_type": "epsilon"})
    assert MinSnr(noise).weights(times).tolist() == pytest.approx([1.0, 5 / 9, 1.0])


def test_weights_of_an_unknown_noise_are_all_alike() -> None:
    assert MinSnr(PlainConfig()).weights(torch.tensor([3, 90])).tolist() == [1.0, 1.0]


def test_distillation_weighs_the_squared_errors_of_inputs() -> None:
    loss = Distillation(SgdConfig(lr=0.1), features=1.0)
    student, teacher = (
        torch.tensor([[1.0, 2.0], [0.0, 4.0]]),
        torch.tensor([[1.0, 1.0], [3.0, 4.0]]),
    )
    found = loss.losses(
        (student, [student]), (teacher, [teacher]), None, weights=torch.tensor([2, 0])
    )
    # The first input alone counts: 2 (0 + 1) / 2 (1 + 1).
    assert float(found["outputs"]) == pytest.approx(0.5)
    assert float(found["features"]) == pytest.approx(0.5)
    even = loss.losses((student, ()), (teacher, ()), None, weights=torch.ones(2))
    assert torch.equal(even["outputs"], feature_loss([student], [teacher]))


def test_tuning_of_a_denoiser_is_weighted() -> None:
    of_model: dict[str, Any] = {"scheduler": PlainConfig(), "input_shape": SHAPE}
    plan = resolve(tiny_denoiser(), None, "w4a8", "fast", steps=8, sampling_steps=4, **of_model)
    tuning = plan.recipe.tuning
    assert isinstance(tuning, Distillation)
    assert tuning.time_weights == MinSnr(PlainConfig())
