"""Denoising networks of diffusion models, as the library diffusers has them."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gdfq.diffusion.pipeline import PARTS
from gdfq.diffusion.scheduler import SchedulerConfig
from gdfq.errors import UsageError
from gdfq.models.loaded import Loaded

_CONDITIONS = {
    "UNet2DModel": "class_labels",
    "UNet2DConditionModel": "encoder_hidden_states",
    "DiTTransformer2DModel": "class_labels",
}
"""The networks that can be loaded, with the name of the condition that each takes."""
_RENAMED = {"Transformer2DModel": "DiTTransformer2DModel"}
"""Names that older files have for these networks."""


class Denoiser(nn.Module):
    """A network of diffusers as (images, time steps[, conditions]) -> predictions.

    Attributes:
        network: The network.
        condition_name: The name of the condition among its arguments.
    """

    def __init__(self, network: nn.Module, condition_name: str) -> None:
        super().__init__()
        self.network = network
        self.condition_name = condition_name

    def forward(self, sample: Tensor, timestep: Tensor, condition: Tensor | None = None) -> Tensor:
        given = {} if condition is None else {self.condition_name: condition}
        found: Tensor = self.network(sample, timestep, **given, return_dict=False)[0]
        return found


def load_denoiser(diffusers: Any, name: str, pretrained: bool) -> Loaded:
    """Load the denoiser of a pipeline with its scheduler, or a denoiser alone.

    Args:
        diffusers: The library.
        name: A folder that `save_pretrained` of a pipeline or of a network wrote, or an id of a
            hub.
        pretrained: Load the weights; they cannot be left out.

    Raises:
        UsageError: It holds no denoiser that can be quantized.
    """
    if not pretrained:
        raise UsageError(
            "the denoiser of a diffusion model comes with the weights of its folder. Remove "
            "--weights."
        )
    part, kind = _part_of(diffusers, name)
    place = {} if part is None else {"subfolder": part}
    network = getattr(diffusers, kind).from_pretrained(name, use_safetensors=True, **place)
    config = network.config
    _check_conditions(kind, config)
    scheduler = None
    if part is not None:
        # Each class of schedulers reads the configuration of any.
        values = diffusers.DDIMScheduler.load_config(name, subfolder="scheduler")
        scheduler = SchedulerConfig.of(values)
    return Loaded(
        Denoiser(network, _CONDITIONS[kind]),
        shape_of_images(config),
        scheduler=scheduler,
        conditions=_labels_of(kind, config),
    )


def _part_of(diffusers: Any, name: str) -> tuple[str | None, str]:
    """Return the name of the denoiser in a pipeline, None for a network alone, and its class."""
    folder = Path(name)
    if folder.is_dir() and not (folder / "model_index.json").exists():
        part, kind = None, diffusers.UNet2DModel.load_config(name).get("_class_name")
    else:
        index = diffusers.DiffusionPipeline.load_config(name)
        part = next((part for part in PARTS if index.get(part)), None)
        kind = index[part][1] if part is not None else index.get("_class_name")
    kind = _RENAMED.get(str(kind), str(kind))
    if kind not in _CONDITIONS:
        raise UsageError(
            f"the denoiser of a diffusion model must be one of {', '.join(_CONDITIONS)}; "
            f"{name} has a {kind}. Give it as file.py:factory with --scheduler: a network "
            "(x_t, t[, condition]) -> prediction."
        )
    return part, kind


def _check_conditions(kind: str, config: Any) -> None:
    """Check that a network takes one condition at most.

    Raises:
        UsageError: It takes others.
    """
    for name in ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type"):
        if config.get(name):
            raise UsageError(
                "a denoiser must take an image, a time step and at most one condition; this "
                f"{kind} also takes what {name} = {config[name]!r} needs. Give it as "
                "file.py:factory, with the other inputs fixed."
            )


def shape_of_images(config: Any) -> tuple[int, ...] | None:
    """Return the shape of an image [C, H, W], if the network says it."""
    size = config.get("sample_size")
    if size is None:
        return None
    return (config["in_channels"], *((size, size) if isinstance(size, int) else size))


def _labels_of(kind: str, config: Any) -> Tensor | None:
    """Return the labels of all classes [M] of a class-conditional network."""
    name = "num_embeds_ada_norm" if kind == "DiTTransformer2DModel" else "num_class_embeds"
    count = config.get(name)
    return None if count is None else torch.arange(count)
