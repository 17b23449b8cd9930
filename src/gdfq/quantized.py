"""The quantized network: what a run gives, runs as a module, and is saved and loaded."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from gdfq.artifacts import packed
from gdfq.card import Card
from gdfq.data import load_data
from gdfq.evaluate import top1
from gdfq.progress import Listener, silent


class QuantizedNetwork(nn.Module):
    """A frozen low-bit classifier: normalised images [N, *input_shape] -> logits [N, classes].

    Weights are integer codes; activations are rounded to their grids while it runs. `metrics`
    holds the seconds and steps of the run that made it, and the top-1 accuracies of teacher and
    student if test images were given (empty after `load`).
    """

    def __init__(
        self, network: fx.GraphModule, card: Card, metrics: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.network = network
        self.card = card
        self.metrics = dict(metrics or {})

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)
        return logits

    @property
    def device(self) -> torch.device:
        return next(self.buffers()).device

    def evaluate(self, data: Any, *, listener: Listener = silent) -> float:
        """Top-1 accuracy in percent on labelled images (see `gdfq.data.load_data`)."""
        images = load_data(data, self.card.input_shape, self.card.classes)
        preprocessing = self.card.preprocessing
        return top1(self, images, preprocessing, device=self.device, listener=listener)

    def save(self, path: str | Path) -> None:
        """Write `student.json` and `student.safetensors` into the folder `path`."""
        packed.save(self.network, self.card, Path(path))


def load(path: str | Path) -> QuantizedNetwork:
    """Read what `QuantizedNetwork.save` or a run wrote; needs neither the user's code nor model.

    Raises UsageError when there is no finished network, or it is damaged or of a newer version.
    """
    return QuantizedNetwork(*packed.read(Path(path)))
