"""Prompts: what a text-to-image model is asked for, from the names of classes."""

from collections.abc import Sequence
from dataclasses import dataclass

from gdfq.errors import UsageError
from gdfq.files.plain_values import tagged

TEMPLATES = (
    "a photo of a {}",
    "a photo of a small {}",
    "a photo of a large {}",
    "a good photo of a {}",
    "a close-up photo of a {}",
    "a bright photo of a {}",
    "a dark photo of a {}",
    "a cropped photo of a {}",
)
"""Templates in the manner of CLIP: an adjective and the name of a class (GenQ, arXiv
2312.05272)."""


@tagged("Prompts")
@dataclass(frozen=True)
class Prompts:
    """Prompts that cover the classes in turn, and the templates for each class in turn.

    Attributes:
        templates: Sentences with {} for the class.
        classes_per_prompt: Classes that are named together, as "a cat and a dog" (mixup-class
            prompts, arXiv 2507.21947).
    """

    templates: tuple[str, ...] = TEMPLATES
    classes_per_prompt: int = 1

    def __post_init__(self) -> None:
        if not self.templates or not all(text.count("{}") == 1 for text in self.templates):
            raise UsageError(
                f"each prompt template must have one {{}} for the class; got {self.templates}."
            )
        if self.classes_per_prompt < 1:
            raise UsageError(
                f"a prompt must name at least one class; got {self.classes_per_prompt}."
            )

    def classes_of(self, index: int, count: int) -> tuple[int, ...]:
        """Return the classes that an image shows.

        Args:
            index: Number of the image.
            count: Number of classes.
        """
        apart = 1 + index // count  # other pairs in each round
        named = min(self.classes_per_prompt, count)
        return tuple(dict.fromkeys((index + place * apart) % count for place in range(named)))

    def text_of(self, index: int, names: Sequence[str]) -> str:
        """Return the prompt of an image.

        Args:
            index: Number of the image.
            names: Name of each class.
        """
        template = self.templates[index // len(names) % len(self.templates)]
        chosen = [names[place] for place in self.classes_of(index, len(names))]
        return template.format(" and a ".join(chosen))
