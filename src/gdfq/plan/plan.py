"""A run, resolved."""

from dataclasses import dataclass, replace
from typing import Any

from gdfq.analysis.run_costs import Following
from gdfq.analysis.samples import SAMPLES
from gdfq.data.class_names import ClassNames
from gdfq.data.preprocessing import Preprocessing
from gdfq.data.tensors import Data as GivenData
from gdfq.data.tokens import Decode
from gdfq.deploy.card import Card
from gdfq.deploy.target import Target
from gdfq.diffusion.sampler import Sampler
from gdfq.effort import Effort
from gdfq.files.plain_values import as_values
from gdfq.graph.capture import Captured
from gdfq.graph.ends import describe
from gdfq.graph.inputs import takes_images
from gdfq.plan.elsewhere import PlannedGeneration
from gdfq.plan.images import source_of
from gdfq.recipes import Recipe
from gdfq.sources.base import Source
from gdfq.sources.candidates import Candidates
from gdfq.student.scheme import (
    Scheme,
)


@dataclass(frozen=True)
class Timing:
    """What the time of a run consists of besides the run, for a plan with a budget.

    Attributes:
        started: When the time began, by `time.perf_counter`; None if it begins with the plan.
        following: What follows the run. Its `capture_seconds` are those of the plan's network.
    """

    started: float | None = None
    following: Following = Following()  # noqa: RUF009 (frozen)


@dataclass(frozen=True, eq=False)
class Plan:
    """A run, resolved: what is quantized, how, and on which images.

    Attributes:
        teacher: The captured full-precision network, on its device.
        scheme: What is quantized, to how many bits.
        recipe: The recipe, fitted to the network's input.
        source: Where the images come from: the recipe's source, or the given images.
        preprocessing: From pixels to the network's inputs.
        size: The size of the ONNX file in bytes, where bits are to be chosen for it.
        given: Real images that the source draws from.
        test: Images that teacher and student are measured on, and that nothing else sees.
        candidates: Images from elsewhere, of which a screen adds some to those of the source.
        generation: Candidates that a text-to-image model makes when the run begins.
        weights_sha256: A hash of the weights, as the user's network has them; by it, runs of the
            same network are recognised.
        seconds: How long loading and capturing the network took.
        notes: What was taken of the weights file, for the user.
        budget: Seconds of the whole run, for which images, iterations and steps were chosen.
        planned_seconds: Seconds that the run was expected to take, where they were chosen; None for
            a run that resumes.
        target: Where the result is to run, where the user says it.
        decode: The text of token ids, of a language model with a tokenizer.
        sampler: How a denoiser of a diffusion model is called; None for any other network.
        samples: Images that such a denoiser and its student generate at the end, to be compared.
        class_names: Names of each class, where the network says them.
    """

    teacher: Captured
    scheme: Scheme
    recipe: Recipe
    source: Source
    preprocessing: Preprocessing
    size: int | None = None
    given: GivenData | None = None
    test: GivenData | None = None
    candidates: Candidates | None = None
    generation: PlannedGeneration | None = None
    weights_sha256: str = ""
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    budget: float | None = None
    planned_seconds: float | None = None
    target: Target | None = None
    decode: Decode | None = None
    sampler: Sampler | None = None
    samples: int = SAMPLES
    class_names: ClassNames | None = None

    @property
    def carried_out(self) -> Recipe:
        """The recipe with the source of this plan: the given images in place of made ones."""
        return replace(self.recipe, source=self.source)

    @property
    def effort(self) -> Effort:
        """Images, iterations and steps."""
        return self.carried_out.effort

    @property
    def effort_options(self) -> dict[str, int | None]:
        """The options `images`, `iterations` and `steps` that repeat a run with a budget.

        One is None if the run has it without being told. Without tuning the images imply the
        steps, which are given as 0.
        """
        effort = self.effort
        implied = self.source.images_held > 0 and not self.recipe.tuning.trains
        return {
            "images": effort.images,
            "iterations": effort.iterations,
            "steps": 0 if implied else effort.steps,
        }

    def with_effort(self, effort: Effort) -> "Plan":
        """Return this plan with other images, iterations and steps."""
        recipe = self.recipe.with_effort(effort)
        source = source_of(recipe, self.given, self.preprocessing, self.candidates)
        return replace(self, recipe=recipe, source=source)

    def with_candidates(self, candidates: Candidates) -> "Plan":
        """Return this plan with candidates, which are there."""
        source = source_of(self.recipe, self.given, self.preprocessing, candidates)
        return replace(self, candidates=candidates, generation=None, source=source)

    def card(self, scheme: Scheme, seed: int) -> Card:
        """The card of the network that this plan makes.

        Args:
            scheme: The scheme with the bits of all layers.
            seed: Seed of the run.
        """
        return Card(
            inputs=self.teacher.inputs,
            classes=self.teacher.classes,
            outputs=self.teacher.outputs,
            preprocessing=self.preprocessing,
            bits=scheme.bits,
            placement=scheme.placement,
            recipe=self.recipe.name,
            seed=seed,
            layer_bits=tuple(map(str, scheme.layer_bits)),
            class_names=self.class_names,
        )

    def as_values(self) -> dict[str, Any]:
        """The plan's settings as plain values, for the configuration file of a run."""
        return {
            "weights_sha256": self.weights_sha256,
            "input": _inputs_as_values(self.teacher),
            "output": describe(self.teacher, self.teacher.ends),
            "normalisation": as_values(self.preprocessing),
            "bits": str(self.scheme.bits) if self.size is None else "auto",
            "size": self.size,
            "placement": self.scheme.placement,
            **({} if self.scheme.group_size is None else {"group_size": self.scheme.group_size}),
            "layer_bits": list(map(str, self.scheme.layer_bits)),
            "recipe": as_values(self.recipe),
            "effort": self.effort_options,
            "budget": self.budget,
            "target": None if self.target is None else self.target.name,
            "sampler": None if self.sampler is None else self.sampler.plain_value(),
            "generate_with": None if self.generation is None else self.generation.as_values(),
        }


def _inputs_as_values(teacher: Captured) -> Any:
    """The shape of one image, or the inputs by name."""
    if takes_images(teacher.inputs):
        return list(teacher.input_shape)
    return {
        spec.name: {"shape": list(spec.shape), "dtype": str(spec.dtype).removeprefix("torch.")}
        for spec in teacher.inputs
    }
