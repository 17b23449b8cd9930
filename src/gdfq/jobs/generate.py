"""Images from a network alone, written into a folder."""

from collections.abc import Sequence
from pathlib import Path

import click
import torch

from gdfq.capture import capture
from gdfq.jobs.warnings import warn_about_normalisation
from gdfq.making import generate
from gdfq.models import load_model
from gdfq.progress import Terminal
from gdfq.saving import ImageFiles


def write_images(
    *,
    model: str,
    weights: Path | None,
    input_shape: tuple[int, ...] | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    recipe: str,
    out: Path,
    count: int,
    steps: int | None,
    seed: int,
    device: str,
    classifier: bool | None,
    png: bool,
) -> None:
    """`gdfq generate`."""
    files = ImageFiles(out, png)
    loaded = load_model(model, weights)
    shape, preprocessing = loaded.input(input_shape, mean, std)
    if loaded.preprocessing is None:
        warn_about_normalisation(mean, std)
    files.prepare(shape)
    example = torch.zeros(1, *shape)
    teacher = capture(loaded.module, example, classifier=classifier)
    with Terminal() as terminal:
        images, labels = generate(
            teacher,
            example,
            count,
            recipe,
            steps=steps,
            seed=seed,
            device=device,
            listener=terminal,
        )
    written = files.write(images, labels, preprocessing, teacher.classes or 1)
    click.echo(f"{len(images)} images: {', '.join(map(str, written))}")
