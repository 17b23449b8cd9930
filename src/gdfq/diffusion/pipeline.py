"""A quantized denoiser in the place of the original one, inside a pipeline of diffusers."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gdfq.diffusion.scheduler import require_diffusers
from gdfq.errors import UsageError, first_line

PARTS = ("unet", "transformer")
"""The names that pipelines give their denoiser."""
_CONDITIONS = ("class_labels", "encoder_hidden_states")


class _Output(NamedTuple):
    """What a denoiser of diffusers returns."""

    sample: Tensor


class StandIn(nn.Module):
    """A denoiser with the interface of one of diffusers.

    Attributes:
        denoiser: The network (images, time steps[, conditions]) -> predictions.
        config: The configuration of the original denoiser.
        inputs: Number of inputs of the network.
    """

    def __init__(self, denoiser: nn.Module, original: Any, inputs: int) -> None:
        super().__init__()
        self.denoiser, self.config, self.inputs = denoiser, original.config, inputs
        self.dtype = torch.float32

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.denoiser.buffers()).device

    def forward(
        self,
        sample: Tensor,
        timestep: Any,
        *conditions: Any,
        return_dict: bool = True,
        **named: Any,
    ) -> Any:
        """Return what the original denoiser would return; further options must be None."""
        given = [*conditions, *(named.pop(name) for name in _CONDITIONS if name in named)]
        used = [condition for condition in given if condition is not None]
        unknown = [name for name, value in named.items() if value is not None]
        if len(used) != self.inputs - 2 or unknown:
            raise UsageError(
                f"the quantized denoiser takes an image, a time step and {self.inputs - 2} "
                f"conditions; the pipeline gives {len(used)} conditions"
                f"{''.join(f', {name}' for name in unknown)}. Call the pipeline without them."
            )
        times = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        found = self.denoiser(sample, times, *used)
        return _Output(found) if return_dict else (found,)


def with_denoiser(pipeline: Any, denoiser: nn.Module, inputs: int) -> Any:
    """Return a pipeline with another denoiser in the place of its own.

    Args:
        pipeline: A pipeline of diffusers, which is changed; or the id or folder of one.
        denoiser: The network (images, time steps[, conditions]) -> predictions.
        inputs: Number of its inputs.

    Raises:
        UsageError: It cannot be loaded, or has no denoiser.
    """
    if isinstance(pipeline, str):
        diffusers = require_diffusers("a pipeline")
        try:
            found = diffusers.DiffusionPipeline.from_pretrained(pipeline, use_safetensors=True)
        except Exception as error:  # the hub, the files and each component have errors of their own
            raise UsageError(
                f"{pipeline} must be a pipeline of diffusers that can be loaded; it is not: "
                f"{first_line(error)}."
            ) from error
    else:
        found = pipeline
    part = next((name for name in PARTS if getattr(found, name, None) is not None), None)
    if part is None:
        raise UsageError(
            f"a pipeline must have a denoiser, as {' or '.join(PARTS)}; this "
            f"{type(found).__name__} has none."
        )
    stand_in = StandIn(denoiser, getattr(found, part), inputs).eval()
    setattr(found, part, stand_in)
    return found
