"""Options of generated images."""

from pathlib import Path
from typing import Any

from gdfq.errors import UsageError
from gdfq.generation.generation import Generation


def taken_from(options: dict[str, Any], folder: Path) -> Generation | None:
    """Take the options of generated images out of others.

    Args:
        options: Options of a command, changed in place.
        folder: Folder of the images.

    Returns:
        What they say; None without a pipeline.

    Raises:
        UsageError: One of them cannot be used, or class names were given without a pipeline.
    """
    names = ("guidance", "denoising_steps", "classes_per_prompt")
    pipeline, classes = options.pop("generate_with"), options.pop("classes")
    chosen = {name: options.pop(name) for name in names}
    batch = options.pop("generate_batch")
    if pipeline is not None:
        return Generation(pipeline, folder, classes, batch=batch, **chosen)
    if classes is not None:
        raise UsageError(
            "--classes names the classes of generated images; there are none. "
            "Give --generate-with, or remove --classes."
        )
    return None
