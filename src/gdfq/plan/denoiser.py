"""The sampler of a plan: how a denoiser of a diffusion model is called."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gdfq.diffusion.sampler import STEPS, Sampler
from gdfq.diffusion.scheduler import SchedulerConfig
from gdfq.errors import UsageError, first_line
from gdfq.files.untrusted import check_shape, read_npz
from gdfq.graph.capture import Captured, ExampleInputs, capture

Conditions = str | Path | Tensor
"""Conditions [M, ...], or an .npz file that has them as `conditions`."""


@dataclass(frozen=True, eq=False)
class DenoiserOptions:
    """What the user says about a diffusion model.

    Attributes:
        scheduler: The configuration of a scheduler, or its file; None for the pipeline's own.
        sampling_steps: Steps of a trajectory; None for 50.
        conditions: Conditions of which trajectories get one each; None for the network's classes.

    Raises:
        UsageError: The scheduler or the conditions cannot be used.
    """

    scheduler: SchedulerConfig | None = None
    sampling_steps: int | None = None
    conditions: Tensor | None = None

    @classmethod
    def of(
        cls,
        scheduler: str | Path | Mapping[str, Any] | None = None,
        sampling_steps: int | None = None,
        conditions: Conditions | None = None,
    ) -> "DenoiserOptions":
        """Read the options."""
        return cls(
            None if scheduler is None else SchedulerConfig.of(scheduler),
            sampling_steps,
            None if conditions is None else _conditions(conditions),
        )

    def sampler(
        self,
        shape: tuple[int, ...] | None,
        scheduler: SchedulerConfig | None = None,
        conditions: Tensor | None = None,
    ) -> Sampler | None:
        """Return the sampler of a network; None for a network that is no denoiser.

        Args:
            shape: Shape of one image, if it is known.
            scheduler: That of the network's pipeline, if there is one.
            conditions: The labels of the network's classes, if it has any.

        Raises:
            UsageError: There is no scheduler, or the shape is not known.
        """
        scheduler = self.scheduler or scheduler
        if scheduler is None:
            if self.sampling_steps is None and self.conditions is None:
                return None
            raise UsageError(
                "sampling_steps and conditions are for denoisers of diffusion models, which have a "
                "scheduler; none was given. Give --scheduler, its scheduler_config.json."
            )
        if shape is None:
            raise UsageError(
                "the shape of a denoiser's image must be known; this network does not define it. "
                "Give it with --input, as --input 3x32x32."
            )
        check_shape(shape)
        own = self.conditions if self.conditions is not None else conditions
        steps = STEPS if self.sampling_steps is None else self.sampling_steps
        return Sampler(scheduler, shape, steps, own)


def captured_denoiser(
    module: nn.Module, sampler: Sampler, example_inputs: ExampleInputs | None = None
) -> Captured:
    """Capture a denoiser.

    Args:
        module: The network.
        sampler: How it is called.
        example_inputs: Inputs of a call, where their names must be given.

    Raises:
        UsageError: It cannot be captured as a network of an image, a time step and, if there are
            any, a condition.
    """
    try:
        inputs = sampler.example() if example_inputs is None else example_inputs
        captured = capture(module, inputs, classifier=False)
    except UsageError as error:
        raise UsageError(f"{first_line(error)}{_advice(module, sampler)}") from error
    check_inputs(captured, sampler)
    return captured


def check_inputs(captured: Captured, sampler: Sampler) -> None:
    """Check that a network takes what a sampler gives it, and ends in its prediction.

    Raises:
        UsageError: It takes other inputs, or ends in a function that capture splits off.
    """
    functions = [kind for kind in captured.ends.kinds if kind != "values"]
    if functions:
        raise UsageError(
            "a denoiser must end in what it predicts; this one ends in a "
            f"{functions[0]}, in front of which networks are quantized. Leave it out of the "
            "network, and let the scheduler clip (clip_sample)."
        )
    expected = [(tuple(x.shape[1:]), x.dtype) for x in sampler.example()]
    if [(spec.shape, spec.dtype) for spec in captured.inputs] != expected:
        raise UsageError(
            "a denoiser must take an image, a time step and, if there are conditions, one of them, "
            f"here {', '.join(f'{dtype} {list(shape)}' for shape, dtype in expected)}; it takes "
            f"{', '.join(map(str, captured.inputs))}. Give --input and --conditions that fit."
        )


def _advice(module: nn.Module, sampler: Sampler) -> str:
    """Return what may help a denoiser that cannot be captured."""
    given = "an image, a time step" + (" and a condition" * (sampler.conditions is not None))
    advice = f" The denoiser was called with {given}"
    if sampler.conditions is None:
        advice += "; if it needs a condition, such as embeddings of prompts, give --conditions"
    if any(hasattr(part, "set_default_attn_processor") for part in module.modules()):
        advice += (
            "; attention processors other than diffusers' own may not be traceable: call "
            "set_default_attn_processor() of the network first"
        )
    return f"{advice}."


def _conditions(given: Conditions) -> Tensor:
    if isinstance(given, Tensor):
        return given.detach().cpu()
    try:
        array = read_npz(Path(given), ["conditions"])["conditions"]
        return torch.from_numpy(array)
    except Exception as error:  # zipfile and zlib raise types of their own
        raise UsageError(
            "conditions must be an .npz file with an array `conditions` [M, ...], labels of "
            f"classes or embeddings of prompts; {given} is none: {first_line(error)}."
        ) from error
