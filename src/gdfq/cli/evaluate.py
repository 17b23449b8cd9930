"""`gdfq evaluate`: accuracy on labelled images, or generated images against full precision."""

from pathlib import Path
from typing import Unpack

import click

from gdfq.api import compare_samples, load
from gdfq.errors import UsageError
from gdfq.execution.listeners import Terminal
from gdfq.plan.options import NetworkOptions


def evaluate(
    folder: Path,
    *,
    test: Path | None,
    samples: int | None,
    model: str | None,
    features: str | None,
    seed: int,
    memory: int | None,
    **options: Unpack[NetworkOptions],
) -> None:
    """Print the accuracy of the quantized network in a folder, or how its images compare."""
    if (test is None) == (samples is None):
        raise UsageError(
            "evaluate measures on labelled images (--test), or a denoiser on images that it "
            "generates (--samples). Give one of them."
        )
    quantized = load(folder)
    if test is not None:
        with Terminal() as terminal:
            accuracy = quantized.evaluate(test, listener=terminal, memory=memory)
        click.echo(f"top-1 {accuracy:.2f} %")
        return
    if model is None:
        raise UsageError(
            "the images of a quantized denoiser are compared with those of the network that it was "
            "made from, which the folder does not hold. Give --model, and its options as for gdfq "
            "quantize."
        )
    with Terminal() as terminal:
        found = compare_samples(
            quantized,
            model,
            samples=samples,
            features=features,
            seed=seed,
            listener=terminal,
            memory=memory,
            **options,
        )
    click.echo(f"PSNR {found.psnr:.2f} dB over {found.images} images ({found.psnr_low:.2f} dB low)")
    if found.frechet is not None:
        click.echo(f"Fréchet distance {found.frechet:.4f}")
