"""What the report says of the denoiser of a diffusion model."""

from collections.abc import Iterator

from gdfq.report.drop import Level
from gdfq.report.read import Record, Run, number

_GOOD_DECIBELS, _FAIR_DECIBELS = 30.0, 20.0
"""PSNRs of root mean square errors of 3 % of the range, where images look alike, and of 10 %."""


def is_denoiser(run: Run) -> bool:
    """Return whether a run is of a denoiser, whether or not it generated images."""
    return run.config.get("sampler") is not None or bool(run.evidence.get("samples"))


def samples_of(run: Run) -> Record | None:
    """Return how the images of both networks compare; None if that was not measured."""
    return run.metrics.get("samples") or run.evidence.get("samples")


def level_of(run: Run) -> Level:
    """Return the level of a run of a denoiser, by the mean PSNR of its images."""
    ratio = number((samples_of(run) or {}).get("psnr"))
    if ratio is None:
        return "unknown"
    good, fair = ratio >= _GOOD_DECIBELS, ratio >= _FAIR_DECIBELS
    return "good" if good else "fair" if fair else "poor"


def facts(run: Run) -> Iterator[str]:
    """Yield what the level is based on."""
    found = samples_of(run)
    if found is None:
        return
    low, frechet = number(found.get("psnr_low")), number(found.get("frechet"))
    tenth = "" if low is None else f"; a tenth of them is below {low:.1f} dB"
    yield (
        f"Images: PSNR {float(found['psnr']):.1f} dB over {found['images']} pairs of images from "
        f"the same noise{tenth}."
    )
    if frechet is not None:
        yield f"Fréchet distance to the images of the original: {frechet:.3f}."


def advice(run: Run, level: Level) -> Iterator[str]:
    """Yield what to do next."""
    if level == "unknown":
        yield (
            f"Compare the images of both networks: gdfq evaluate {run.folder} --samples 64 "
            "--model MODEL."
        )
    elif level != "good":
        bits = run.config.get("bits")
        if bits == "w8a8":
            yield "Floating-point grids of 8 bits may lose less: --bits wfp8afp8."
        elif bits != "wfp8afp8":
            yield "More bits lose less: --bits wfp8afp8 or w8a8."
    else:
        yield "Nothing needs to be done. Look at the pairs of images, then use the result."
