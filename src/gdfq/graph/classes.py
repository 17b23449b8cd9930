"""What the outputs of a captured network are: logits of classes, unit vectors or other values."""

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from gdfq.errors import UsageError
from gdfq.execution.seeding import stream as random_stream
from gdfq.graph.ends import (
    Ends,
    are_probabilities,
    are_unit_vectors,
    split,
    with_logarithm,
    with_unit_vectors,
)
from gdfq.graph.inputs import InputSpec
from gdfq.graph.outputs import in_order

_IMAGES_OF_NOISE = 8
"""Images on which outputs that look like unit vectors are checked again."""


@torch.no_grad()
def divided(
    network: fx.GraphModule,
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    specs: Sequence[InputSpec],
    classifier: bool | None,
) -> tuple[fx.GraphModule, Ends, int | None]:
    """Divide a captured network in its body and its end, and find its classes.

    Args:
        network: The captured network.
        outputs: What the user's network returned.
        inputs: What it was called with.
        specs: Specifications of the inputs.
        classifier: Whether its output is of classes, if the user says it.

    Returns:
        The body, the end, and the number of classes or None.

    Raises:
        UsageError: The network is no classifier, and the user says that it is.
    """
    body, ends = split(network)
    values = in_order(body(*inputs))
    if classifier is not False and ends.kind == "values" and are_probabilities(values[0]):
        body, ends = split(with_logarithm(network))
        values = in_order(body(*inputs))
    ends = _with_unit_vectors(body, ends, values, specs)
    return body, ends, _classes(outputs, values, ends, classifier)


def _classes(
    outputs: Sequence[Tensor], values: Sequence[Tensor], ends: Ends, classifier: bool | None
) -> int | None:
    """Return the number of classes, or None for outputs that are not of classes.

    Args:
        outputs: What the network returned.
        values: What its body returned.
        ends: How the one is made of the other.
        classifier: What the user says.
    """
    first, shape = values[0], values[0].shape
    fits = len(values) == 1 and first.ndim == 2 and shape[1] >= 2
    fits = fits and all(output.shape == shape for output in outputs)
    if classifier and not fits:
        raise UsageError(
            "a classifier returns one tensor of logits [batch, classes], with two classes or "
            f"more; for {len(first)} images this network returned {_shapes(outputs)}. "
            "Remove classifier."
        )
    if classifier is None:
        classifier = ends.kind not in {"sigmoid", "unit_norm"}
    return shape[1] if fits and classifier else None


def _shapes(outputs: Sequence[Tensor]) -> str:
    return ", ".join(str(list(output.shape)) for output in outputs)


def _with_unit_vectors(
    body: fx.GraphModule, ends: Ends, values: Sequence[Tensor], specs: Sequence[InputSpec]
) -> Ends:
    """Return the ends with outputs recognised that are unit vectors for noise, too."""
    if not any(map(are_unit_vectors, values)):
        return ends
    if all(spec.dtype.is_floating_point for spec in specs):
        draw = random_stream(0, "capture.unit vectors")
        values = in_order(body(*(spec.noise(_IMAGES_OF_NOISE, draw) for spec in specs)))
    return with_unit_vectors(ends, values)
