"""A tiny pipeline of diffusers with random weights."""

from pathlib import Path

import torch


def saved_pipeline(folder: Path, classes: int = 1000) -> Path:
    """A class-conditional pipeline with random weights, of images of 16x16."""
    import diffusers

    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        sample_size=8, num_layers=1, patch_size=4, attention_head_dim=8, num_attention_heads=2,
        in_channels=4, out_channels=8, num_embeds_ada_norm=classes, norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    pipeline = diffusers.DiTPipeline(transformer, vae, diffusers.DDIMScheduler())
    pipeline.save_pretrained(folder)
    return folder
