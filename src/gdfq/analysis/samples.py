"""Images that a denoiser and its student generate from the same noise."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gdfq.diffusion.sampler import Sampler
from gdfq.errors import UsageError, first_line
from gdfq.execution.context import Context
from gdfq.execution.progress import Step
from gdfq.execution.seeding import stream as random_stream
from gdfq.functional.frechet import frechet_distance
from gdfq.graph.capture import Captured
from gdfq.graph.memory import forward_images

SAMPLES = 64
"""Images by default."""
_AT_ONCE = 64
"""Images that are generated together, at most."""
_SHOWN, _MAX_SIDE_PIXELS = 16, 64
"""Images in the report, and their longest side."""
_ENDS = 0.01
"""Share of the values at each end that does not count for the range of images."""
_MAX_PSNR = 120.0
"""Of equal images, in dB."""
_SEEDS = 2**62

Features = Callable[[Tensor], Tensor]
"""Images [N, *shape] as the sampler gives them -> features [N, D]."""


@dataclass(frozen=True, eq=False)
class SampleComparison:
    """How the images of a student differ from those of full precision, from the same noise.

    Attributes:
        images: Number of images of each.
        psnr: Peak signal-to-noise ratio in dB, the mean over images.
        psnr_low: The ratio that a tenth of the images is below.
        frechet: Fréchet distance of the features of both; None without a network for features.
        timesteps: Time step of each call of the denoiser.
        errors: Relative error of the predictions in each call, in percent: of both networks at
            the points of the full-precision trajectories.
        teacher: Pixels of the first images of full precision, uint8 [n, C, h, w]; empty if they are
            no images of one or three channels.
        student: Pixels of the same images of the student.
    """

    images: int
    psnr: float
    psnr_low: float
    frechet: float | None
    timesteps: tuple[float, ...]
    errors: tuple[float, ...]
    teacher: np.ndarray[Any, Any]
    student: np.ndarray[Any, Any]

    def as_values(self) -> dict[str, Any]:
        """Return the figures as plain values for JSON."""
        found: dict[str, Any] = {
            "images": self.images,
            "psnr": round(self.psnr, 3),
            "psnr_low": round(self.psnr_low, 3),
        }
        return found if self.frechet is None else found | {"frechet": round(self.frechet, 4)}

    def __str__(self) -> str:
        """Return the figures in words."""
        found = f"PSNR {self.psnr:.2f} dB over {self.images} images ({self.psnr_low:.2f} dB low)"
        return found if self.frechet is None else f"{found}, Fréchet distance {self.frechet:.4f}"


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Return 10 log₁₀(R² / MSE) of each image, in dB.

    R is the range of the reference images together, without the lowest and the highest hundredth
    of the values: single values beyond the pixels would make it larger. At most 120 dB.

    Args:
        images: [N, *shape].
        reference: What they are compared with, [N, *shape].

    Returns:
        [N].
    """
    low, high = _range(reference.double())
    extent = (high - low).clamp_min(1e-12)
    errors = (images.double() - reference.double()).square().flatten(1).mean(1)
    return -10 * (errors / extent.square()).clamp_min(10 ** (-_MAX_PSNR / 10)).log10()


def compare_samples(
    teacher: Captured,
    student: Callable[..., Tensor],
    sampler: Sampler,
    count: int = SAMPLES,
    features: Features | None = None,
    context: Context = Context(),
) -> SampleComparison:
    """Generate images with teacher and student from the same noise, and compare them.

    Args:
        teacher: The full-precision denoiser.
        student: Takes and returns what `teacher.network` does, on the same device.
        sampler: How both are called.
        count: Number of images of each, at least 2 for a Fréchet distance.
        features: Gives the features of the Fréchet distance.
        context: Its seed gives the noise; its listener receives each call as a step of "samples".

    Raises:
        UsageError: The count is no positive number, or the features are no vectors.
    """
    if not isinstance(count, int) or count < 1:
        raise UsageError(f"samples must be a whole number of at least 1; got {count}.")
    if features is not None:
        _check_features(features, count, sampler.shape, teacher.device)
    draw = random_stream(context.seed, "samples.draw")
    seeds = torch.randint(_SEEDS, (count,), generator=draw).tolist()
    most = forward_images(teacher.network.graph, context.memory, teacher.device)
    parts = [seeds[i : i + min(most, _AT_ONCE)] for i in range(0, count, min(most, _AT_ONCE))]
    calls, total = sampler.calls, 2 * len(parts) * sampler.calls
    done = 0
    powers = torch.zeros(2, calls, dtype=torch.float64)

    def step(call: int, inputs: tuple[Tensor, ...], prediction: Tensor) -> None:
        nonlocal done
        del call, inputs, prediction
        done += 1
        context.listener(Step("samples", done, total, {}))

    def compare(call: int, inputs: tuple[Tensor, ...], prediction: Tensor) -> None:
        # Channels of a variance that the scheduler does not use are not there.
        difference = student(*inputs)[:, : prediction.shape[1]] - prediction
        powers[0, call] += difference.double().square().sum().cpu()
        powers[1, call] += prediction.double().square().sum().cpu()
        step(call, inputs, prediction)

    made: list[list[Tensor]] = [[], []]
    for part in parts:
        made[0].append(sampler.run(teacher.network, part, teacher.device, compare).cpu())
        made[1].append(sampler.run(student, part, teacher.device, step).cpu())
    expected, found = map(torch.cat, made)
    ratios = psnr(found, expected)
    errors = 100 * (powers[0] / powers[1].clamp_min(1e-30)).sqrt()
    return SampleComparison(
        count,
        float(ratios.mean()),
        float(ratios.quantile(0.1)),
        None if features is None else _distance(features, found, expected, teacher.device),
        tuple(map(float, sampler.timesteps)),
        tuple(errors.tolist()),
        *_pictures([expected[:_SHOWN], found[:_SHOWN]]),
    )


def _range(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the ends of the values without a hundredth at each end."""
    values = images.flatten().sort().values
    edge = int(_ENDS * len(values))
    return values[edge], values[len(values) - 1 - edge]


@torch.no_grad()
def _check_features(
    features: Features, count: int, shape: tuple[int, ...], device: torch.device
) -> None:
    """Raise UsageError for features of which there can be no distance, before images are made."""
    if count < 2:
        raise UsageError(f"a Fréchet distance needs 2 samples or more; got {count}. Give more.")
    try:
        found = features(torch.randn(2, *shape, generator=random_stream(0, "features")).to(device))
    except Exception as error:  # a function of the user
        raise UsageError(
            f"features must take images [N, {', '.join(map(str, shape))}]; they raise "
            f"{first_line(error)}. Give a network for images of this size."
        ) from error
    if not isinstance(found, Tensor) or found.ndim != 2:
        what = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise UsageError(f"features must be a tensor [N, D]; got {what} for two images.")


@torch.no_grad()
def _distance(features: Features, images: Tensor, reference: Tensor, device: torch.device) -> float:
    """Return the Fréchet distance of the features of two sets of images."""
    sets = [
        torch.cat([features(part.to(device)).cpu() for part in given.split(_AT_ONCE)])
        for given in (images, reference)
    ]
    return float(frechet_distance(*sets))


def _pictures(images: Sequence[Tensor]) -> list[np.ndarray[Any, Any]]:
    """Return pixels uint8 [n, C, h, w] of images of one range, with no side longer than 64."""
    reference = images[0]
    if reference.ndim != 4 or reference.shape[1] not in (1, 3):
        return [np.zeros(0, np.uint8) for _ in images]
    low, high = _range(reference)
    longest = max(reference.shape[2:])
    scale = min(1.0, _MAX_SIDE_PIXELS / longest)
    size = [max(1, round(side * scale)) for side in reference.shape[2:]]
    small = [F.interpolate(part, size, mode="area") for part in images]
    shares = [((part - low) / (high - low).clamp_min(1e-12)).clamp(0, 1) for part in small]
    return [(255 * share).round().to(torch.uint8).numpy() for share in shares]
