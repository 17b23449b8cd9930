"""Pipelines of diffusers: tiny random ones, saved to disk. `make check` installs the library."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_pipeline import saved_pipeline

from gdfq.errors import UsageError
from gdfq.generation import pipelines
from gdfq.generation.pipelines import Request, load_pipeline

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

    made = pipelines.DiffusersPipeline(Text(), 3.5, None, None)
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
