"""Trajectories of a sampler."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.denoisers import CLASSES, SHAPE, saved_unet, tiny_denoiser
from support.plain_scheduler import PlainConfig
from torch import Tensor

from gdfq.diffusion.sampler import Sampler
from gdfq.diffusion.scheduler import SchedulerConfig
from gdfq.errors import UsageError


def test_images_are_those_of_the_arithmetic_by_hand() -> None:
    sampler = Sampler(PlainConfig(times=10, sigma=3.0), (1, 2), 2)
    noise = torch.randn((1, 2), generator=torch.Generator().manual_seed(7))
    seen: list[tuple[int, list[Tensor]]] = []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        return x + t[:, None, None]

    found = sampler.run(denoise, [7], visit=lambda call, inputs, _: seen.append((call, [*inputs])))
    first = 3 * noise
    second = first - (first / 2 + 10) / 2
    torch.testing.assert_close(found[0], second - (second / 2 + 5) / 2)
    assert [call for call, _ in seen] == [0, 1]
    torch.testing.assert_close(seen[1][1][0][0], second / 2)
    assert [inputs[1].tolist() for _, inputs in seen] == [[10], [5]]


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_trajectory_depends_on_its_seed_alone(noise: float) -> None:
    sampler = Sampler(PlainConfig(noise=noise), SHAPE, 4, torch.arange(CLASSES))
    denoise = tiny_denoiser(CLASSES)
    together = sampler.run(denoise, [5, 6, 7])
    for seed, image in zip([5, 6, 7], together, strict=True):
        torch.testing.assert_close(sampler.run(denoise, [seed])[0], image, rtol=1e-4, atol=1e-5)
    assert not torch.equal(together[0], together[1])


def test_conditions_are_drawn_from_all() -> None:
    labels = torch.tensor([3, 8, 9])
    seen = set()

    def denoise(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        seen.update(label.tolist())
        assert len(label) == len(t) == len(x)
        return x

    Sampler(PlainConfig(), (1, 1), 1, labels).run(denoise, range(40))
    assert seen == {3, 8, 9}


@torch.no_grad()
def test_given_conditions_are_those_of_the_trajectories() -> None:
    denoise, labels = tiny_denoiser(CLASSES), torch.tensor([2, 0])
    found = Sampler(PlainConfig(), SHAPE, 1).run(denoise, [5, 6], conditions=labels)
    draws = (torch.Generator().manual_seed(seed) for seed in (5, 6))
    noise = torch.stack([torch.randn(SHAPE, generator=draw) for draw in draws])
    torch.testing.assert_close(found, noise - denoise(noise / 2, torch.full((2,), 100), labels))


def test_predicted_variance_is_left_out() -> None:
    sampler = Sampler(PlainConfig(), (2, 3), 2)
    plain = sampler.run(lambda x, t: x, [1, 2])
    doubled = sampler.run(lambda x, t: torch.cat([x, 9 * x], 1), [1, 2])
    torch.testing.assert_close(plain, doubled)
    with pytest.raises(UsageError, match="it predicts 1x3"):
        sampler.run(lambda x, t: x[:, :1], [1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "at least 1; got 0"),
        ({"conditions": torch.zeros(0, 3)}, "at least one condition"),
    ],
)
def test_unusable_values_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Sampler(PlainConfig(), SHAPE, **options)


def test_plain_value_tells_samplers_apart() -> None:
    def values(conditions: Tensor | None, steps: int = 3) -> Any:
        return Sampler(PlainConfig(), SHAPE, steps, conditions).plain_value()

    one = values(torch.tensor([1, 2]))
    assert one == values(torch.tensor([1, 2]))
    others = [values(torch.tensor([1, 3])), values(None), values(torch.tensor([1, 2]), 4)]
    assert one not in others


@pytest.mark.needs("diffusers")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["DDIMScheduler", "DDPMScheduler"])
def test_images_are_those_of_a_pipeline(kind: str, tmp_path: Path) -> None:
    import diffusers

    pipeline: Any = diffusers.DDPMPipeline.from_pretrained(saved_unet(tmp_path))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = getattr(diffusers, kind)()
    sampler = Sampler(SchedulerConfig.of(pipeline.scheduler), SHAPE, 3)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        found: Tensor = pipeline.unet(x, t).sample
        return found

    ours = (sampler.run(denoise, [4]) / 2 + 0.5).clamp(0, 1)
    draw = torch.Generator().manual_seed(4)
    made = pipeline(num_inference_steps=3, generator=draw, output_type="pt").images
    torch.testing.assert_close(ours, torch.as_tensor(made), atol=1e-5, rtol=0)
