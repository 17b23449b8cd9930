"""Images from elsewhere: photographs, and images of a text-to-image model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gdfq.data.class_names import ClassNames
from gdfq.data.datasets import load_unlabelled
from gdfq.data.preprocessing import Preprocessing
from gdfq.errors import UsageError
from gdfq.execution.context import Context
from gdfq.generation.generation import Generation
from gdfq.graph.capture import Captured
from gdfq.graph.inputs import image_shape
from gdfq.plan.method import Method
from gdfq.plan.options import Data, ImageOptions
from gdfq.recipes import Recipe
from gdfq.sources.candidates import Candidates

_GENERATED_SHARE = 2
"""Images that are generated, relative to those that the recipe makes. The screen drops about half
of them."""


@dataclass(frozen=True)
class PlannedGeneration:
    """Generated images that a run makes before all others.

    Attributes:
        generation: What the user asks for.
        names: Name of each class.
        count: Number of images.
    """

    generation: Generation
    names: tuple[str, ...]
    count: int

    def as_values(self) -> dict[str, Any]:
        """Return plain values for the configuration file of a run."""
        return {
            "pipeline": self.generation.pipeline,
            "folder": str(self.generation.folder),
            "images": self.count,
        }

    def made(self, teacher: Captured, preprocessing: Preprocessing, context: Context) -> Candidates:
        """Make the images, by the first process, and return them as candidates.

        Raises:
            UsageError: The pipeline cannot be used, or the folder holds other images.
        """
        if context.group.rank == 0:
            self.generation.make(
                self.names, self.count, context.seed, teacher.device, context.listener
            )
        context.group.wait()
        return load_candidates(self.generation.folder, teacher, preprocessing, kind="generated")


def planned_generation(
    generation: Generation, recipe: Recipe, teacher: Captured, names: ClassNames | None
) -> PlannedGeneration:
    """Return how many images of a text-to-image model a run makes, and of what.

    Args:
        generation: What the user asks for.
        recipe: The recipe, fitted to the network's input.
        teacher: The captured network.
        names: Names of its classes, where the network has them.

    Raises:
        UsageError: The network has no classes, they have no names, or it takes more than images.
    """
    _image_shape(teacher)  # before images are made, which takes long
    count = _GENERATED_SHARE * recipe.source.images_held
    return PlannedGeneration(generation, generation.names_of(teacher.classes, names), count)


def check_images(method: Method, images: ImageOptions) -> None:
    """Check what can be checked of images before a network is loaded.

    Raises:
        UsageError: The method cannot use images from elsewhere, two kinds of them were given, or
            the run would use the test images.
    """
    proxy, generation = images.get("proxy"), images.get("generate_with")
    for name, used in (("data", images.get("data")), ("proxy", proxy)):
        if _are_one_path(used, images.get("test")):
            raise UsageError(
                "test images must be used for nothing else, or the test says too much; test and "
                f"{name} are both {used}. Give other images to one of them, or remove test."
            )
    if generation is not None and not isinstance(generation, Generation):
        raise UsageError(
            f"generate_with must be a gdfq.Generation; got {generation!r}. "
            "Give gdfq.Generation(model, folder=...), where the images are kept."
        )
    if proxy is not None and generation is not None:
        raise UsageError(
            "images from elsewhere are photographs or generated ones; both were given. "
            "Give either proxy or generate_with."
        )
    if proxy is not None or generation is not None:
        check_takes_candidates(method)


def _are_one_path(images: object, others: object) -> bool:
    """Whether two sets of images are the same file or folder."""
    if not (isinstance(images, str | Path) and isinstance(others, str | Path)):
        return False
    return Path(images).resolve() == Path(others).resolve()


def check_takes_candidates(method: Method) -> None:
    """Check that a method can use images without labels beside those of its source.

    Raises:
        UsageError: It learns labels, has no pool of images, or has a budget, which does not count
            the screen.
    """
    if method.recipe.tuning.learns_labels:
        raise UsageError(
            "images from elsewhere have no labels but the teacher's predictions; recipe "
            f"{method.recipe.name!r} learns labels. Use a recipe that learns the teacher's outputs "
            "alone, such as fast, or remove the images."
        )
    if not method.recipe.source.images_held:
        raise UsageError(
            "images from elsewhere join a pool of images, such as that of recipe fast; recipe "
            f"{method.recipe.name!r} has none. Use fast or quick, or remove the images."
        )
    if method.effort.budget is not None:
        raise UsageError(
            "a budget does not count the time of judging images from elsewhere. Give images, "
            "iterations and steps instead of the budget, or remove the images."
        )


def load_candidates(
    proxy: Data | Candidates,
    teacher: Captured,
    preprocessing: Preprocessing,
    kind: str = "proxy",
) -> Candidates:
    """Read images that have nothing to do with a network.

    Args:
        proxy: The images, as a path or in memory; or candidates, which are taken as they are.
        teacher: The captured network.
        preprocessing: From pixels to its inputs.
        kind: What they are, for the user.

    Raises:
        UsageError: They cannot be used, or the network takes something else than images.
    """
    if isinstance(proxy, Candidates):
        return proxy
    images = load_unlabelled(proxy, _image_shape(teacher), preprocessing.resize)
    return Candidates(images, preprocessing, kind)


def _image_shape(teacher: Captured) -> tuple[int, ...]:
    """Return the shape of images from elsewhere, for a network that only takes images."""
    return image_shape(
        teacher.inputs,
        needs="images from elsewhere need",
        advice="Remove the images.",
    )
