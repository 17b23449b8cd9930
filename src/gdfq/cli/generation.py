"""Options of generated images."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from gdfq.errors import UsageError
from gdfq.generation.generation import Generation

_FIELDS = {
    "classes": "classes",
    "guidance": "guidance",
    "denoising_steps": "denoising_steps",
    "classes_per_prompt": "classes_per_prompt",
    "generate_batch": "batch",
}
"""Options of generated images, and the fields of `Generation` that they are."""


_OF_RECIPES = ("recipe", "steps", "png", "memory")
"""Options of `gdfq generate` that say how a recipe makes images, and that no pipeline reads."""


def taken_from(options: dict[str, Any], folder: Path) -> Generation | None:
    """Take the options of generated images out of others.

    Args:
        options: Options of a command, changed in place; None for what was not given.
        folder: Folder of the images.

    Returns:
        What they say; None without a pipeline.

    Raises:
        UsageError: One of them cannot be used, or some were given without a pipeline.
    """
    pipeline = options.pop("generate_with")
    said = {name: options.pop(name) for name in _FIELDS}
    given = {name: value for name, value in said.items() if value is not None}
    if pipeline is not None:
        return Generation(pipeline, folder, **{_FIELDS[name]: v for name, v in given.items()})
    if given:
        names = _as_typed(given)
        raise UsageError(
            f"there must be generated images for {names}; there are none. Give --generate-with, or "
            f"remove {names}."
        )
    return None


def check_no_recipe(context: click.Context) -> None:
    """Check that no option of recipes is given beside a pipeline, which would ignore it.

    Args:
        context: Of `gdfq generate`. It tells a given value from a default.

    Raises:
        UsageError: Some are.
    """
    sources = {name: context.get_parameter_source(name) for name in _OF_RECIPES}
    given = [name for name, source in sources.items() if source is not ParameterSource.DEFAULT]
    if given:
        names = _as_typed(given)
        raise UsageError(
            f"{names} must be given without --generate-with, whose pipeline makes the images and "
            f"writes PNG files; got both. Remove {names}; --denoising-steps and --generate-batch "
            "set the steps and the memory of a pipeline."
        )


def _as_typed(names: Iterable[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)
