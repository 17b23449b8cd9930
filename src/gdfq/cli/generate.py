"""`gdfq generate`: images from a network alone, written into a folder."""

from pathlib import Path
from typing import Unpack

import click

from gdfq.cli.console import warn_about_normalisation
from gdfq.data.writers import ImageFiles
from gdfq.execution.budget import MemoryBudget
from gdfq.execution.context import Context
from gdfq.execution.listeners import Terminal
from gdfq.generation.generation import Generation
from gdfq.pipeline import make_images
from gdfq.plan.network import resolve_network
from gdfq.plan.options import NetworkOptions
from gdfq.recipes import find_recipe


def generate(
    *,
    model: str,
    recipe: str,
    out: Path,
    count: int,
    steps: int | None,
    seed: int,
    png: bool,
    memory: int | None,
    generation: Generation | None = None,
    **options: Unpack[NetworkOptions],
) -> None:
    """Make images and write their files."""
    if generation is not None:
        network = resolve_network(model, **options)
        teacher = network.teacher
        names = generation.names_of(teacher.classes, network.class_names)
        with Terminal() as terminal:
            made = generation.make(names, count, seed, teacher.device, terminal)
        click.echo(f"{count} images: {made}")
        return
    files = ImageFiles(out, png)
    chosen = find_recipe(recipe)
    network = resolve_network(model, **options)
    warn_about_normalisation(network.assumed)
    teacher = network.teacher
    files.prepare(teacher.input_shape)
    with Terminal() as terminal:
        context = Context(seed=seed, listener=terminal, memory=MemoryBudget.of(memory))
        images, labels = make_images(teacher, chosen, count, context, steps=steps)
    written = files.write(images, labels, network.preprocessing, teacher.classes or 1)
    click.echo(f"{len(images)} images: {', '.join(map(str, written))}")
