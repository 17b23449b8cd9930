"""Images from a network alone, written into a folder."""

from pathlib import Path
from typing import Unpack

import click
import torch

from gdfq.cli.network import NetworkOptions, open_network
from gdfq.data.writers import ImageFiles
from gdfq.execution.listeners import Terminal
from gdfq.graph.capture import capture
from gdfq.making import generate


def write_images(
    *,
    recipe: str,
    out: Path,
    count: int,
    steps: int | None,
    seed: int,
    device: str,
    classifier: bool | None,
    png: bool,
    **options: Unpack[NetworkOptions],
) -> None:
    """`gdfq generate`."""
    files = ImageFiles(out, png)
    network, shape, preprocessing = open_network(warns=True, **options)
    files.prepare(shape)
    example = torch.zeros(1, *shape)
    teacher = capture(network, example, classifier=classifier)
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
