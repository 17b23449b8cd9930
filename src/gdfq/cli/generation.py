"""Images of a text-to-image model for `gdfq quantize` and `gdfq generate`."""

from dataclasses import dataclass
from pathlib import Path

from gdfq.data.class_names import ClassNames
from gdfq.data.folders import class_names_of
from gdfq.errors import UsageError
from gdfq.execution.listeners import Terminal
from gdfq.generation.pipelines import load_pipeline, place_of
from gdfq.generation.pool import PoolSettings, make_pool
from gdfq.generation.prompts import Prompts
from gdfq.plan import Network


@dataclass(frozen=True)
class Generation:
    """The options of generated images.

    Attributes:
        pipeline: Name of the pipeline, "diffusers:ID_OR_FOLDER".
        classes: File with the name of one class a line; None for the network's own names.
        guidance: Scale of classifier-free guidance.
        denoising_steps: Steps of an image; None for the pipeline's own number.
        classes_per_prompt: Classes that a prompt names.
        batch: Images that are made together.
    """

    pipeline: str
    classes: Path | None
    guidance: float
    denoising_steps: int | None
    classes_per_prompt: int
    batch: int

    @classmethod
    def of(
        cls,
        *,
        generate_with: str | None,
        classes: Path | None,
        guidance: float,
        denoising_steps: int | None,
        classes_per_prompt: int,
        generate_batch: int,
    ) -> "Generation | None":
        """Return the options, or None without a pipeline.

        Raises:
            UsageError: Class names were given without a pipeline, or the pipeline is no name.
        """
        if generate_with is None:
            if classes is not None:
                raise UsageError(
                    "--classes names the classes of generated images; there are none. "
                    "Give --generate-with, or remove --classes."
                )
            return None
        place_of(generate_with)
        return cls(
            generate_with, classes, guidance, denoising_steps, classes_per_prompt, generate_batch
        )

    def folder(self, network: Network, folder: Path, count: int, seed: int) -> Path:
        """Make the images in a folder, and return it; those that are there stay.

        Raises:
            UsageError: The classes or the pipeline cannot be used, or the folder holds others.
        """
        names = self._names(network)
        settings = PoolSettings(
            self.pipeline,
            names,
            Prompts(classes_per_prompt=self.classes_per_prompt),
            self.guidance,
            self.denoising_steps,
            seed,
        )
        with Terminal() as terminal:
            return make_pool(
                folder,
                settings,
                count,
                lambda: load_pipeline(
                    self.pipeline,
                    names,
                    network.teacher.device,
                    guidance=self.guidance,
                    steps=self.denoising_steps,
                ),
                batch=self.batch,
                listener=terminal,
            )

    def _names(self, network: Network) -> tuple[str, ...]:
        """Return a name for each class."""
        count = network.teacher.classes
        if count is None:
            raise UsageError(
                "images are generated from the names of classes; the outputs of this network are "
                "not classes. Use --proxy with photographs that resemble its inputs."
            )
        names: ClassNames | None = network.class_names
        if self.classes is not None:
            names = class_names_of(self.classes, count)
        if names is None:
            raise UsageError(
                f"images are generated from the names of the network's {count} classes, which it "
                "does not have. Give --classes, a file with one name a line."
            )
        return tuple(own[0] for own in names)
