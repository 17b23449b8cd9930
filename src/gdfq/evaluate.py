"""Accuracy on labelled images."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from gdfq.data import ImageData, Preprocessing
from gdfq.errors import UsageError
from gdfq.progress import Listener, Step, silent


@torch.no_grad()
def logits_of(
    network: Callable[[Tensor], Tensor],
    data: ImageData,
    preprocessing: Preprocessing,
    *,
    device: torch.device,
    batch: int = 250,
    listener: Listener = silent,
) -> Tensor:
    """The network's logits [N, C], on the CPU, for all images in order."""
    logits = []
    parts = torch.arange(len(data)).split(batch)
    for step, chosen in enumerate(parts, start=1):
        logits.append(network(preprocessing(data.images(chosen)).to(device)).cpu())
        listener(Step("evaluate", step, len(parts), {}))
    return torch.cat(logits)


def top1(
    network: nn.Module,
    data: ImageData,
    preprocessing: Preprocessing,
    *,
    device: torch.device,
    listener: Listener = silent,
) -> float:
    """Share of images, in percent, whose highest logit is that of the label.

    The network is taken as it is: put it into evaluation mode first.
    Raises UsageError for data without labels.
    """
    if data.labels is None:
        raise UsageError("accuracy needs labels; this data has none. Give (images, labels).")
    logits = logits_of(network, data, preprocessing, device=device, listener=listener)
    answers = logits.argmax(1)
    return 100 * float((answers == data.labels).double().mean())
