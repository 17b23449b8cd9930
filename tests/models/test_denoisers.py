"""Denoisers of diffusers: tiny random ones, saved to disk. `make check` installs the library."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.denoisers import SHAPE, saved_unet
from support.narrowing import present
from support.tiny_pipeline import saved_pipeline

from gdfq.errors import UsageError
from gdfq.models.registry import load_model
from gdfq.plan.network import resolve_network

pytestmark = [pytest.mark.needs("diffusers"), pytest.mark.filterwarnings("ignore")]


def test_pipeline_gives_its_denoiser_and_scheduler(tmp_path: Path) -> None:
    import diffusers

    place = saved_unet(tmp_path)
    loaded = load_model(f"diffusers:{place}")
    assert loaded.input_shape == SHAPE
    assert loaded.conditions is None
    assert present(loaded.scheduler).name == "DDIMScheduler"
    network: Any = diffusers.UNet2DModel.from_pretrained(place, subfolder="unet")
    x, t = torch.randn(3, *SHAPE), torch.tensor([1, 500, 999])
    teacher = resolve_network(f"diffusers:{place}").teacher
    with torch.no_grad():
        torch.testing.assert_close(
            teacher.network(x, t), network(x, t).sample, rtol=1e-4, atol=1e-5
        )


def test_network_alone_needs_a_scheduler(tmp_path: Path) -> None:
    place = saved_unet(tmp_path / "alone", classes=5, pipeline=False)
    saved_unet(tmp_path / "pipeline")
    assert present(load_model(f"diffusers:{place}").conditions).tolist() == [0, 1, 2, 3, 4]
    scheduler = tmp_path / "pipeline" / "scheduler" / "scheduler_config.json"
    network = resolve_network(f"diffusers:{place}", scheduler=scheduler, sampling_steps=3)
    assert [spec.kind for spec in network.teacher.inputs] == ["image", "integers", "integers"]
    assert present(network.sampler).calls == 3
    with pytest.raises(UsageError, match="have a scheduler; none was given"):
        resolve_network(f"diffusers:{place}", sampling_steps=3)
    with pytest.raises(UsageError, match="diffusion model alone needs --scheduler"):
        resolve_network(f"diffusers:{place}")


def test_transformer_of_a_pipeline_predicts_its_variance_too(tmp_path: Path) -> None:
    network = resolve_network(f"diffusers:{saved_pipeline(tmp_path, classes=7)}", sampling_steps=2)
    sampler = present(network.sampler)
    assert sampler.shape == (4, 8, 8)
    assert present(sampler.conditions).tolist() == list(range(7))
    images = sampler.run(network.teacher.network, [1, 2])
    assert images.shape == (2, 4, 8, 8)


def test_embeddings_of_prompts_must_be_given(tmp_path: Path) -> None:
    import diffusers

    torch.manual_seed(0)
    network: Any = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 8), norm_num_groups=4,
        layers_per_block=1, attention_head_dim=4, cross_attention_dim=6,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    network.save_pretrained(tmp_path / "text")
    model, scheduler = f"diffusers:{tmp_path / 'text'}", diffusers.DDIMScheduler()
    with pytest.raises(UsageError, match="embeddings of prompts, give --conditions"):
        resolve_network(model, scheduler=scheduler)
    np.savez(tmp_path / "prompts.npz", conditions=np.random.randn(5, 3, 6).astype("float32"))
    found = resolve_network(model, scheduler=scheduler, conditions=tmp_path / "prompts.npz")
    assert [str(spec) for spec in found.teacher.inputs][2] == "condition: 3x6 image"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_embed_type": "timestep"}, "class_embed_type = 'timestep'"),
        (None, "must be one of UNet2DModel, UNet2DConditionModel, DiTTransformer2DModel"),
    ],
)
def test_other_networks_are_refused(
    change: dict[str, Any] | None, message: str, tmp_path: Path
) -> None:
    import diffusers

    torch.manual_seed(0)
    if change is None:
        network: Any = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    else:
        network = diffusers.UNet2DModel(
            sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
            down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, **change,
        )  # fmt: skip
    network.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=message):
        load_model(f"diffusers:{tmp_path}")


def test_place_without_a_network_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="save_pretrained wrote, as diffusers:FOLDER"):
        load_model(f"diffusers:{tmp_path}")
    with pytest.raises(UsageError, match="Remove --weights"):
        load_model(f"diffusers:{saved_unet(tmp_path / 'pipeline')}", "random")
