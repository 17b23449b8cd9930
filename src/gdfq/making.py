"""Synthetic images alone."""

from torch import Tensor, nn

from gdfq.errors import UsageError
from gdfq.execution.context import Context
from gdfq.execution.precision import find_device
from gdfq.execution.progress import Listener, silent
from gdfq.execution.seeding import check_seed
from gdfq.execution.tracing import beside_no_tracing, giving_way
from gdfq.graph.capture import Captured, capture
from gdfq.recipes import Recipe, find_recipe


@beside_no_tracing
def generate(
    model: nn.Module | Captured,
    example_input: Tensor,
    count: int = 1024,
    recipe: str | Recipe = "fast",
    *,
    steps: int | None = None,
    seed: int = 0,
    device: str = "auto",
    classifier: bool | None = None,
    listener: Listener = silent,
) -> tuple[Tensor, Tensor | None]:
    """Synthetic images alone: [count, *input_shape] normalised floats, and their labels [count].

    A network whose outputs are not classes (see `quantize`) has no labels.

    The first images of a pool are those that the recipe would tune on. Any other source runs the
    recipe's `steps`, or as many as `count` images need if that is more; the images are its last
    ones, when a generator has learned most. Raises UsageError and GdfqError
    as `quantize` does.
    """
    if count < 1:
        raise UsageError(f"count must be at least 1; got {count}.")
    check_seed(seed)
    recipe = find_recipe(recipe)
    context = Context(seed=seed, listener=giving_way(listener))
    if not isinstance(model, Captured):
        model = capture(model, example_input, classifier=classifier)
    teacher = model.to(find_device(device))
    images, labels = recipe.source.make_images(
        teacher, count, steps=steps, planned=recipe.steps, context=context
    )
    return images.cpu(), None if labels is None else labels.cpu()
