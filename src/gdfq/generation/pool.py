"""A folder of generated images, which is made once and used by any number of networks."""

import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gdfq.errors import UsageError, first_line
from gdfq.execution.progress import Listener, Step, silent
from gdfq.execution.seeding import stream as random_stream
from gdfq.files.atomic import make_folder, write_atomically, write_json
from gdfq.files.plain_values import as_values
from gdfq.files.untrusted import read_json, within
from gdfq.generation.pipelines import Pipeline, Request
from gdfq.generation.prompts import Prompts

_SETTINGS = "generated.json"
_NUMBERED = re.compile(r"[0-9]{6,}\.png")
"""Names of the images."""


@dataclass(frozen=True)
class PoolSettings:
    """What the images of a pool depend on, apart from their number.

    Attributes:
        pipeline: Name of the pipeline.
        classes: Names of the classes.
        prompts: What is asked for.
        guidance: Scale of classifier-free guidance.
        steps: Denoising steps; None for the pipeline's own number.
        seed: Seed of all images.
    """

    pipeline: str
    classes: tuple[str, ...]
    prompts: Prompts = field(default_factory=Prompts)
    guidance: float = 3.5
    steps: int | None = None
    seed: int = 0

    def request(self, index: int) -> Request:
        """Return what is asked for in one image; it depends on no other image."""
        return Request(
            self.prompts.text_of(index, self.classes),
            self.prompts.classes_of(index, len(self.classes))[0],
            random_stream(self.seed, f"generated.{index}").initial_seed(),
        )

    def as_values(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        values = {**vars(self), "prompts": as_values(self.prompts), "classes": list(self.classes)}
        return dict(json.loads(json.dumps(values)))


def make_pool(
    folder: Path,
    settings: PoolSettings,
    count: int,
    load: Callable[[], Pipeline],
    *,
    batch: int = 4,
    listener: Listener = silent,
) -> Path:
    """Write images 0..count − 1 of a pool as PNG files; those that are there stay.

    A stopped call resumes at the first batch that is not there.

    Args:
        folder: The folder. It is made if it does not exist.
        settings: What the images depend on.
        count: Number of images.
        load: Loads the pipeline; it is called only if an image is missing.
        batch: Images that are made together.
        listener: Receives each batch as a step of the stage "diffusion".

    Returns:
        The folder.

    Raises:
        UsageError: The folder holds images with other settings, or whose settings are unknown.
    """
    _check_settings(folder, settings)
    missing = [index for index in range(count) if not _file(folder, index).exists()]
    if not missing:
        return folder
    pipeline = load()  # before anything is written: it may not be of use
    make_folder(folder)
    write_json(folder / _SETTINGS, settings.as_values())
    done = count - len(missing)
    for start in range(0, len(missing), batch):
        chosen = missing[start : start + batch]
        for index, image in zip(chosen, pipeline(_requests(settings, chosen)), strict=True):
            buffer = io.BytesIO()
            image.convert("RGB").save(buffer, format="PNG")
            write_atomically(_file(folder, index), buffer.getvalue())
        done += len(chosen)
        listener(Step("diffusion", done, count, {}))
    return folder


def _requests(settings: PoolSettings, indices: Sequence[int]) -> list[Request]:
    return [settings.request(index) for index in indices]


def _file(folder: Path, index: int) -> Path:
    return within(folder, folder / f"{index:06d}.png")


def _check_settings(folder: Path, settings: PoolSettings) -> None:
    """Raise UsageError for a folder whose images are not of these settings."""
    path = within(folder, folder / _SETTINGS)
    if not path.exists():
        _check_empty(folder)
        return
    try:
        found = read_json(path)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{path} must be as gdfq wrote it; it is damaged or was changed ({first_line(error)}), "
            f"and how the images of {folder} were generated is unknown. Remove the folder, or "
            "choose another one."
        ) from error
    if found != settings.as_values():
        raise UsageError(
            f"{folder} holds images that were generated with other settings ({_SETTINGS}). Use "
            "these, remove the folder, or choose another one."
        )


def _check_empty(folder: Path) -> None:
    """Raise UsageError for a folder without settings that has files with the names of images.

    The settings are written before the first image, so these files are something else.
    """
    entries = folder.iterdir() if folder.is_dir() else ()
    found = sorted(entry.name for entry in entries if _NUMBERED.fullmatch(entry.name))
    if found:
        raise UsageError(
            f"a folder with generated images must hold {_SETTINGS}; {folder} holds {found[0]} "
            "without it, which would be taken for one of them. Choose another folder, or remove "
            f"its files whose names are numbers ({len(found)})."
        )
