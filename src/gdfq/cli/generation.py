"""Options of generated images."""

from pathlib import Path
from typing import Any

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
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise UsageError(
            f"there must be generated images for {names}; there are none. Give --generate-with, or "
            f"remove {names}."
        )
    return None
