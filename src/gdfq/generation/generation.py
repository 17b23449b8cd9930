"""Generated images as a user asks for them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from gdfq.data.class_names import ClassNames
from gdfq.data.folders import class_names_of
from gdfq.errors import UsageError
from gdfq.execution.progress import Listener, silent
from gdfq.generation.pipelines import load_pipeline, place_of
from gdfq.generation.pool import PoolSettings, make_pool
from gdfq.generation.prompts import Prompts


@dataclass(frozen=True)
class Generation:
    """Images of a text-to-image or class-conditional model, made once into a folder.

    Attributes:
        pipeline: Name of a pipeline of diffusers, "diffusers:ID" or "diffusers:FOLDER".
        folder: Folder of the images. Those that are there are not made again, so that several
            networks with the same classes can share it.
        classes: Names of the network's classes, in the order of its outputs; or a text file with
            the name of one class a line. None for the names that the network has.
        guidance: Scale of classifier-free guidance; 3.5 in GenQ (arXiv 2312.05272).
        denoising_steps: Steps of an image; None for the pipeline's own number.
        classes_per_prompt: Classes that a prompt names.
        batch: Images that are made together.

    Raises:
        UsageError: One of them cannot be used.
    """

    pipeline: str
    folder: str | Path
    classes: Sequence[str] | str | Path | None = None
    guidance: float = 3.5
    denoising_steps: int | None = None
    classes_per_prompt: int = 1
    batch: int = 4

    def __post_init__(self) -> None:
        place_of(self.pipeline)
        Prompts(classes_per_prompt=self.classes_per_prompt)
        if not self.guidance >= 0 or self.batch < 1 or (self.denoising_steps or 1) < 1:
            raise UsageError(
                "guidance must be at least 0, and batch and denoising_steps at least 1; got "
                f"{self.guidance}, {self.batch} and {self.denoising_steps}."
            )

    def names_of(self, classes: int | None, names: ClassNames | None = None) -> tuple[str, ...]:
        """Return a name for each class.

        Args:
            classes: Number of the network's classes; None if its outputs are not classes.
            names: Names of the classes, where the network has them.

        Raises:
            UsageError: The network has no classes, or they have no names.
        """
        if classes is None:
            raise UsageError(
                "images are generated from the names of classes; the outputs of this network are "
                "not classes. Use proxy with photographs that resemble its inputs."
            )
        if isinstance(self.classes, str | Path):
            names = class_names_of(Path(self.classes), classes)
        elif self.classes is not None:
            names = tuple((name,) for name in self.classes)
        if names is None:
            raise UsageError(
                f"images are generated from the names of the network's {classes} classes, which "
                "it does not have. Give classes: their names, or a file with one name a line."
            )
        if len(names) != classes:
            raise UsageError(
                f"each of the network's {classes} classes needs a name; {len(names)} were given."
            )
        return tuple(own[0] for own in names)

    def make(
        self,
        names: tuple[str, ...],
        count: int,
        seed: int,
        device: torch.device,
        listener: Listener = silent,
    ) -> Path:
        """Make the images that the folder lacks, and return it.

        Args:
            names: Name of each class.
            count: Number of images.
            seed: Seed of all images.
            device: Where the pipeline computes.
            listener: Receives each batch as a step.

        Raises:
            UsageError: The pipeline cannot be used, or the folder holds other images.
        """
        prompts = Prompts(classes_per_prompt=self.classes_per_prompt)
        steps, guidance = self.denoising_steps, self.guidance
        return make_pool(
            Path(self.folder),
            PoolSettings(self.pipeline, names, prompts, guidance, steps, seed),
            count,
            lambda: load_pipeline(self.pipeline, names, device, guidance=guidance, steps=steps),
            batch=self.batch,
            listener=listener,
        )
