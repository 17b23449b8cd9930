"""Accuracy on labelled images, and similarity of outputs that are not classes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from gdfq.analysis.similarity import Similarity, Totals
from gdfq.data.datasets import how_labelled
from gdfq.data.preprocessing import Preprocessing
from gdfq.data.tensors import Data, network_inputs
from gdfq.errors import UsageError
from gdfq.execution.budget import MemoryBudget
from gdfq.execution.precision import in_full_float32
from gdfq.execution.progress import Listener, Step, silent
from gdfq.execution.tracing import without_concurrent_tracing
from gdfq.graph.capture import Captured
from gdfq.graph.memory import forward_images
from gdfq.graph.outputs import in_order

_MAX_IMAGES = 250
"""Largest batch; the memory budget can make it smaller."""


@dataclass(frozen=True, eq=False)
class Predictions:
    """Predictions of a classifier for N images.

    Attributes:
        classes: The class with the highest logit [N].
        confidence: Its probability [N], in 0..1.
    """

    classes: Tensor
    confidence: Tensor

    @classmethod
    def of(cls, logits: Tensor) -> "Predictions":
        """The predictions of logits [N, C]."""
        confidence, classes = logits.softmax(1).max(1)
        return cls(classes, confidence)

    def top1(self, labels: Tensor) -> float:
        """Share of correct predictions, in percent, for labels [N]."""
        return 100 * float((self.classes == labels).double().mean())


@without_concurrent_tracing
@torch.no_grad()
def logits_of(
    network: Callable[..., Tensor],
    data: Data,
    preprocessing: Preprocessing,
    *,
    device: torch.device,
    listener: Listener = silent,
    memory: MemoryBudget = MemoryBudget(),
) -> Tensor:
    """The logits [N, C] of a classifier for all images, in order, on the CPU.

    Args:
        network: Images as the network takes them -> logits [n, C].
        data: The images.
        preprocessing: From pixels to the input of the network.
        device: Where the network is.
        listener: Receives each batch as a step of "evaluate".
        memory: Budget for the images that pass together; it counts where `network` has a graph.
    """
    batches = _batches(network, data, preprocessing, device, listener, memory)
    with in_full_float32(device):
        return torch.cat([network(*inputs).cpu() for inputs in batches])


def _batches(
    network: object,
    data: Data,
    preprocessing: Preprocessing,
    device: torch.device,
    listener: Listener,
    memory: MemoryBudget,
) -> Iterator[tuple[Tensor, ...]]:
    """All inputs in order, preprocessed, in the largest batches that fit in the memory budget."""
    batch = _MAX_IMAGES
    graph = getattr(network, "graph", None)
    if isinstance(graph, fx.Graph):
        batch = min(batch, forward_images(graph, memory, device))
    parts = torch.arange(len(data)).split(batch)
    for step, chosen in enumerate(parts, start=1):
        given = network_inputs(data, chosen, preprocessing)
        yield tuple(tensor.to(device) for tensor in given)
        listener(Step("evaluate", step, len(parts), {}))


def top1(
    network: nn.Module,
    data: Data,
    preprocessing: Preprocessing,
    *,
    device: torch.device,
    listener: Listener = silent,
    memory: MemoryBudget = MemoryBudget(),
) -> float:
    """Share of images, in percent, whose highest logit is that of the label.

    The mode of the network is not changed: call `eval()` on it first.

    Args:
        network: A classifier.
        data: Labelled images.
        preprocessing: From pixels to the input of the network.
        device: Where the network is.
        listener: Receives each batch as a step of "evaluate".
        memory: Budget for the images that pass together; it counts where the network has a graph.

    Raises:
        UsageError: The data has no labels.
    """
    if data.labels is None:
        raise UsageError(f"accuracy needs labels; this data has none. {how_labelled(data)}")
    logits = logits_of(
        network, data, preprocessing, device=device, listener=listener, memory=memory
    )
    return Predictions.of(logits).top1(data.labels)


@without_concurrent_tracing
@torch.no_grad()
def output_similarities(
    student: Callable[..., Any],
    teacher: Captured,
    data: Data,
    preprocessing: Preprocessing,
    *,
    listener: Listener = silent,
    memory: MemoryBudget = MemoryBudget(),
) -> list[Similarity]:
    """Compare each output of a student with its teacher's over all images; labels are not needed.

    Args:
        student: Returns what `teacher.network` does, on the same device.
        teacher: The trained network.
        data: The images.
        preprocessing: From pixels to the input of the networks.
        listener: Receives each batch as a step of "evaluate".
        memory: Budget for the images that pass together.

    Returns:
        The similarity of each output, in order.
    """
    network, totals = teacher.network, Totals(teacher.ends)
    batches = _batches(network, data, preprocessing, teacher.device, listener, memory)
    with in_full_float32(teacher.device):
        for inputs in batches:
            totals.add_(in_order(network(*inputs)), in_order(student(*inputs)))
    return totals.similarities()
