"""Pipelines of diffusers: tiny random ones, saved to disk. `make check` installs the library."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.denoisers import CLASSES, saved_unet
from support.tiny_pipeline import saved_pipeline

from gdfq.errors import UsageError
from gdfq.generation.pipelines import DiffusersPipeline, Request, load_pipeline

CPU = torch.device("cpu")
NAMES = tuple(f"class {index}" for index in range(1000))
"""DiTPipeline takes 1,000 as its class for no class, whatever its network has."""


def test_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "diffusers" else find(name)
    )
    with pytest.raises(UsageError, match=r"pip install 'gdfq\[diffusion\]'"):
        load_pipeline("diffusers:some/model", NAMES, CPU)


@pytest.mark.needs("diffusers")
@pytest.mark.filterwarnings("ignore")
def test_class_conditional_pipeline_makes_the_images_of_its_seeds(tmp_path: Path) -> None:
    name = f"diffusers:{saved_pipeline(tmp_path / 'tiny')}"
    made = load_pipeline(name, NAMES, CPU, steps=2)
    assert isinstance(made, DiffusersPipeline)
    assert made.labels == tuple(range(1000))
    first, second = Request("a cat", 0, 5), Request("a dog", 1, 6)
    one, other = made([first, second])
    assert one.size == (16, 16)
    assert one.tobytes() != other.tobytes()
    (again,) = made([first])
    difference = torch.frombuffer(bytearray(one.tobytes()), dtype=torch.uint8).int()
    difference -= torch.frombuffer(bytearray(again.tobytes()), dtype=torch.uint8).int()
    assert difference.abs().max() <= 1  # other batches round differently
    with pytest.raises(UsageError, match="has 1000 classes"):
        load_pipeline(name, (*NAMES, "car"), CPU)


@pytest.mark.needs("diffusers")
@pytest.mark.filterwarnings("ignore")
def test_unusable_pipelines_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", "/the/cache")
    with pytest.raises(UsageError, match="the cache \\(/the/cache\\)"):
        load_pipeline(f"diffusers:{tmp_path}", NAMES, CPU)
    import diffusers

    torch.manual_seed(0)
    network = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    diffusers.DDPMPipeline(network, diffusers.DDPMScheduler()).save_pretrained(tmp_path / "plain")
    with pytest.raises(UsageError, match="must take text or classes"):
        load_pipeline(f"diffusers:{tmp_path / 'plain'}", NAMES, CPU)


def test_text_pipeline_gets_prompts_guidance_and_seeds() -> None:
    got: dict[str, Any] = {}

    class Text:
        def __call__(self, prompt: list[str], **options: Any) -> Any:
            got.update(options, prompt=prompt)
            return type("Output", (), {"images": ["one"]})

    made = DiffusersPipeline(Text(), 3.5, None, None)
    assert made([Request("a cat", 0, 5)]) == ["one"]
    assert (got["prompt"], got["guidance_scale"]) == (["a cat"], 3.5)
    assert [draw.initial_seed() for draw in got["generator"]] == [5]
    assert "num_inference_steps" not in got


@pytest.mark.needs("diffusers")
@pytest.mark.filterwarnings("ignore")
def test_guidance_of_other_than_1000_classes_is_refused(tmp_path: Path) -> None:
    name = f"diffusers:{saved_pipeline(tmp_path / 'tiny', classes=6)}"
    with pytest.raises(UsageError, match=r"has 6 classes.*Use guidance 1"):
        load_pipeline(name, NAMES[:6], CPU, guidance=3.5)
    made = load_pipeline(name, NAMES[:6], CPU, guidance=1, steps=1)
    assert made([Request("a cat", 5, 0)])[0].size == (16, 16)


@pytest.mark.needs("diffusers")
@pytest.mark.filterwarnings("ignore")
def test_denoiser_with_classes_makes_what_diffusers_makes_of_each(tmp_path: Path) -> None:
    import diffusers

    folder = saved_unet(tmp_path / "unet", classes=CLASSES)
    requests = [Request("", label, seed) for label, seed in ((2, 5), (0, 6))]
    made = load_pipeline(f"diffusers:{folder}", NAMES[:CLASSES], CPU, guidance=1, steps=3)(requests)
    # The loop of diffusers, which draws no classes.
    pipeline = diffusers.DDIMPipeline.from_pretrained(folder)
    unconditional = type(pipeline.unet).forward
    draws = [torch.Generator().manual_seed(request.seed) for request in requests]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            type(pipeline.unet),
            "forward",
            lambda self, x, t: unconditional(self, x, t, torch.tensor([2, 0])),
        )
        expected = pipeline(2, draws, num_inference_steps=3, output_type="pil").images
    for image, other in zip(made, expected, strict=True):
        assert image.mode == other.mode == "L"
        assert image.size == (8, 8)
        difference = np.asarray(image, np.int16) - np.asarray(other, np.int16)
        assert np.abs(difference).max() <= 1


@pytest.mark.needs("diffusers")
@pytest.mark.filterwarnings("ignore")
def test_denoiser_with_classes_takes_as_many_and_no_guidance(tmp_path: Path) -> None:
    name = f"diffusers:{saved_unet(tmp_path / 'unet', classes=CLASSES)}"
    with pytest.raises(UsageError, match="has no label"):
        load_pipeline(name, NAMES[:CLASSES], CPU)
    with pytest.raises(UsageError, match=f"has {CLASSES} classes"):
        load_pipeline(name, NAMES[: CLASSES + 1], CPU, guidance=1)


@pytest.mark.needs("diffusers")
@pytest.mark.filterwarnings("ignore")
def test_denoiser_of_latents_that_takes_no_classes_is_refused(tmp_path: Path) -> None:
    """Its latents are no images until they are decoded."""
    import diffusers

    torch.manual_seed(0)
    network = diffusers.UNet2DModel(
        sample_size=8, num_class_embeds=CLASSES, block_out_channels=(8, 8), norm_num_groups=4,
        layers_per_block=1, down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    decoder = diffusers.VQModel(block_out_channels=(8,), norm_num_groups=4, latent_channels=3)
    pipeline = diffusers.LDMPipeline(decoder, network, diffusers.DDIMScheduler())
    pipeline.save_pretrained(tmp_path / "latent")
    with pytest.raises(UsageError, match="must be a UNet2DModel that makes images itself"):
        load_pipeline(f"diffusers:{tmp_path / 'latent'}", NAMES[:CLASSES], CPU, guidance=1)
