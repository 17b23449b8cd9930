"""Schedulers of the library diffusers: what happens to an image between two calls of a denoiser."""

import importlib.util
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from gdfq.errors import UsageError, first_line
from gdfq.files.untrusted import read_json
from gdfq.functional.signal_noise import PredictionKind

PREDICTIONS = ("epsilon", "v_prediction", "sample")
"""What a denoiser may predict: the noise, the velocity (arXiv 2202.00512) or the clean image."""


class Scheduler(Protocol):
    """What a sampler needs of a scheduler of diffusers whose time steps are set.

    Attributes:
        timesteps: The time steps in the order of the calls, [calls].
        init_noise_sigma: Standard deviation of the noise that the image starts as.
    """

    timesteps: Tensor
    init_noise_sigma: Any

    def scale_model_input(self, sample: Tensor, timestep: Any) -> Tensor:
        """Return what the denoiser gets for an image."""
        ...

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, **options: Any) -> Any:
        """Return an object whose `prev_sample` is the image of the next call."""
        ...


def require_diffusers(purpose: str) -> Any:
    """Return the library diffusers.

    Args:
        purpose: What needs it, as the subject of a sentence.

    Raises:
        UsageError: It is not installed.
    """
    if importlib.util.find_spec("diffusers") is None:
        raise UsageError(
            f"{purpose} needs the library diffusers, which is not installed. "
            "Install it: pip install 'gdfq[diffusion]'."
        )
    import diffusers

    return diffusers


@dataclass(frozen=True)
class SchedulerConfig:
    """A scheduler of diffusers, as its configuration file describes it.

    Attributes:
        text: The configuration as JSON with sorted keys.

    Raises:
        UsageError: diffusers has no such scheduler, or it does not say what a denoiser predicts.
    """

    text: str

    def __post_init__(self) -> None:
        self._made()

    @classmethod
    def of(cls, given: Any) -> "SchedulerConfig":
        """Return the configuration of a file, of values, or of a scheduler.

        Args:
            given: A file that `scheduler.save_pretrained` wrote, its contents as a mapping, or a
                scheduler of diffusers; a configuration is returned as it is.

        Raises:
            UsageError: It cannot be read, or is no configuration that can be used.
        """
        if isinstance(given, SchedulerConfig):
            return given
        if isinstance(given, Mapping):
            return cls(json.dumps(dict(given), sort_keys=True))
        if hasattr(given, "to_json_string"):  # a scheduler of diffusers
            return cls.of(json.loads(given.to_json_string()))
        try:
            values = read_json(Path(given))
            if not isinstance(values, dict):
                raise ValueError("it is not a JSON object")
        except (OSError, ValueError, TypeError) as error:
            raise UsageError(
                "a scheduler must be a configuration file of diffusers, which "
                f"scheduler.save_pretrained writes; {given} is none: {first_line(error)}."
            ) from error
        return cls(json.dumps(values, sort_keys=True))

    @property
    def values(self) -> dict[str, Any]:
        """The configuration as plain values."""
        found: dict[str, Any] = json.loads(self.text)
        return found

    @property
    def name(self) -> str:
        """Name of the scheduler's class."""
        return str(self.values.get("_class_name"))

    @property
    def prediction(self) -> PredictionKind:
        """What the denoiser predicts."""
        found: PredictionKind = self._made().config["prediction_type"]
        return found

    def signal_to_noise(self, times: Tensor) -> Tensor | None:
        """Return ᾱ / (1 − ᾱ) at time steps [N], [N]; None for a scheduler that has no ᾱ.

        Time steps between two of the training are rounded.
        """
        alphas: Tensor | None = getattr(self._made(), "alphas_cumprod", None)
        if alphas is None:
            return None
        found = alphas.to(times.device)[times.round().long().clamp(0, len(alphas) - 1)]
        return (found / (1 - found)).clamp_min(torch.finfo(found.dtype).tiny)

    def build(self, steps: int) -> Scheduler:
        """Return a new scheduler with the time steps of a sampler of so many steps.

        Raises:
            UsageError: It takes no such number of steps.
        """
        scheduler = self._made()
        try:
            scheduler.set_timesteps(steps)
        except Exception as error:  # each scheduler checks its values in its own way
            raise UsageError(
                f"{self.name} must be able to make {steps} steps from its configuration; it says: "
                f"{first_line(error)}."
            ) from error
        made: Scheduler = scheduler
        return made

    def _made(self) -> Any:
        """Return a new scheduler, without time steps."""
        diffusers = require_diffusers("a scheduler")
        kind = getattr(diffusers, self.name, None)
        if not isinstance(kind, type) or not issubclass(kind, diffusers.SchedulerMixin):
            raise UsageError(
                "the _class_name of a scheduler must be a scheduler of diffusers, such as "
                f"DDIMScheduler; got {self.name!r}. Give the scheduler_config.json of the pipeline."
            )
        try:
            scheduler: Any = kind.from_config(self.values)  # type: ignore[attr-defined]
            # Values that a scheduler does not know stay in its configuration.
            is_told = "prediction_type" in inspect.signature(kind).parameters
            predicts = scheduler.config.get("prediction_type") if is_told else None
        except Exception as error:  # each scheduler checks its values in its own way
            raise UsageError(
                f"{self.name} must be made from its configuration; it says: {first_line(error)}."
            ) from error
        if "noise_sampler_seed" in inspect.signature(kind).parameters:
            raise UsageError(
                f"a trajectory must be a function of its seed; {self.name} draws its noise from "
                "elsewhere. Use another scheduler, such as DPMSolverMultistepScheduler."
            )
        if predicts not in PREDICTIONS:
            raise UsageError(
                "the prediction_type of a scheduler must be one of "
                f"{', '.join(PREDICTIONS)}; that of {self.name} is {predicts!r}. Denoisers that "
                "predict something else, such as a flow, cannot be sampled here."
            )
        built: Scheduler = scheduler
        return built
