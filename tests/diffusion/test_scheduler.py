"""Configurations of schedulers of diffusers."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from gdfq.diffusion.scheduler import SchedulerConfig
from gdfq.errors import UsageError

DDIM = {"_class_name": "DDIMScheduler", "num_train_timesteps": 20, "prediction_type": "epsilon"}


def test_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "diffusers" else find(name)
    )
    with pytest.raises(UsageError, match=r"pip install 'gdfq\[diffusion\]'"):
        SchedulerConfig.of(DDIM)


@pytest.mark.parametrize("content", ["", "[1]", "{", "[" * 5000])
def test_file_that_is_no_configuration_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "scheduler.json").write_text(content)
    for path in (tmp_path / "scheduler.json", tmp_path / "nowhere.json", tmp_path):
        with pytest.raises(UsageError, match="must be a configuration file of diffusers"):
            SchedulerConfig.of(path)


@pytest.mark.needs("diffusers")
def test_scheduler_is_that_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "scheduler_config.json"
    path.write_text(json.dumps(DDIM))
    config = SchedulerConfig.of(path)
    assert config == SchedulerConfig.of(DDIM) == SchedulerConfig.of(config)
    assert config.name == "DDIMScheduler"
    assert config.build(4).timesteps.tolist() == [15, 10, 5, 0]
    assert config.build(4) is not config.build(4)


@pytest.mark.needs("diffusers")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "NoScheduler"}, "'NoScheduler'"),
        ({"_class_name": "UNet2DModel"}, "must be a scheduler of diffusers"),
        ({"_class_name": None}, "got 'None'"),
        ({"prediction_type": "something"}, "that of DDIMScheduler is 'something'"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "predict something else, such as a flow"),
        ({"beta_schedule": "none"}, "it says"),
    ],
)  # fmt: skip
def test_unusable_scheduler_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SchedulerConfig.of({**DDIM, **change})


@pytest.mark.needs("diffusers")
def test_more_steps_than_were_trained_are_refused() -> None:
    with pytest.raises(UsageError, match="able to make 21 steps"):
        SchedulerConfig.of(DDIM).build(21)


@pytest.mark.needs("diffusers")
def test_scheduler_that_cannot_make_one_step_makes_more() -> None:
    assert (
        len(SchedulerConfig.of({**DDIM, "_class_name": "PNDMScheduler"}).build(10).timesteps) > 10
    )


@pytest.mark.needs("diffusers")
def test_scheduler_with_noise_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers

    base: Any = diffusers.DDIMScheduler

    class OwnNoise(base):  # type: ignore[misc]  # as DPMSolverSDEScheduler, which needs torchsde
        def __init__(
            self, prediction_type: str = "epsilon", noise_sampler_seed: int | None = None
        ) -> None:
            super().__init__(prediction_type=prediction_type)

    monkeypatch.setattr(diffusers, "OwnNoise", OwnNoise, raising=False)
    with pytest.raises(UsageError, match="function of its seed"):
        SchedulerConfig.of({**DDIM, "_class_name": "OwnNoise"})
